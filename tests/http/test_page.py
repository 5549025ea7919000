"""The page in a real browser that can reach nothing but the server."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from darwin_runtime.engine.admission import BatchLimits
from darwin_runtime.http.app import make_app
from darwin_runtime.http.service import Service
from darwin_runtime.model.load import load_model
from tests.conftest import ROOT, http_server, program, wait_until
from tests.support.models import BUILDERS, IRIS, model_path
from tests.support.mounts import Mount, public_key
from tests.support.servers import in_thread, serving

pytestmark = pytest.mark.usefixtures("serving_environment")

SCREENSHOT = ROOT / "docs" / "page.png"

Browser = Any


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@contextlib.contextmanager
def chromium(profile: Path, *more: str) -> Iterator[Browser]:
    """A browser of its own, started with `more` switches."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium")
    for switch in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage"),
        *("disable-background-networking", "disable-component-update", "disable-sync", "window-size=1100,1500"),
        # Whatever isn't this machine does not exist.
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"user-data-dir={profile}",
        *more,
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(program("chromedriver", "chromium-driver"))
    driver = webdriver.Chrome(options, service)
    try:
        yield driver
    finally:
        driver.quit()


def element(browser: Browser, selector: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, selector)


def field(browser: Browser, name: str) -> Any:
    return element(browser, f"[name={json.dumps(name)}]")


def fill(browser: Browser, name: str, text: str) -> None:
    field(browser, name).clear()
    field(browser, name).send_keys(text)


def wait_for(browser: Browser, selector: str, pattern: str) -> str:
    """The text at `selector` once it holds `pattern`."""
    wait_until(lambda: re.search(pattern, element(browser, selector).text), f"{pattern} in {selector}")
    return str(element(browser, selector).text)


def complaints(browser: Browser) -> list[str]:
    """What the browser's console says; answers with a 4xx are meant."""
    return [line["message"] for line in browser.get_log("browser") if "status of 4" not in line["message"]]


def origins(browser: Browser) -> set[str]:
    """Every origin that the page asked for anything."""
    found = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if match := re.match(r"https?://[^/]+", url):
                found.add(match[0])
    return found


def test_fill_send_and_see_the_prediction(browser: Browser, ours: Callable[[str], str]) -> None:
    url = ours("iris")
    browser.get_log("performance")
    browser.get(url + "/")
    assert browser.title == "model"
    # From the input example.
    assert field(browser, "petal length (cm)").get_attribute("value") == "1.4"
    for name, value in IRIS.items():
        fill(browser, name, str(value))
    element(browser, "#send").click()
    assert '"scores"' in wait_for(browser, "#answer", r"\[\s*1\s*\]")
    assert re.match(r"200 in \d+\.\d ms", element(browser, "#status").text)
    assert complaints(browser) == []
    assert origins(browser) == {url}
    curl = element(browser, "#curl").get_attribute("textContent")
    assert curl.startswith(f"curl {url}/predict -H 'Content-Type: application/json' -d '")
    body = re.search(r"-d '(.*)'$", curl)
    assert body
    assert requests.post(url + "/predict", data=body[1], timeout=60).json() == {"scores": [1]}


def test_the_python_line_works(
    browser: Browser, ours: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    browser.get(ours("iris") + "/docs")
    exec(element(browser, "#python").get_attribute("textContent"), {})
    assert capsys.readouterr().out == "{'scores': [0]}\n"


def test_a_wrong_value_is_marked_at_its_field(browser: Browser, ours: Callable[[str], str]) -> None:
    browser.get(ours("iris") + "/docs")
    fill(browser, "petal width (cm)", "wide")
    field(browser, "petal width (cm)").send_keys(Keys.ENTER)
    wait_for(browser, "#status", "422")
    bad = element(browser, "[aria-invalid=true]")
    assert bad.get_attribute("name") == "petal width (cm)"
    problem = element(browser, f"#{bad.get_attribute('aria-describedby')}")
    assert "expected double, got string 'wide'" in problem.text
    assert browser.switch_to.active_element == bad
    fill(browser, "petal width (cm)", "0.2")
    element(browser, "#send").click()
    wait_for(browser, "#status", "200")
    assert browser.find_elements(By.CSS_SELECTOR, "[aria-invalid=true]") == []
    assert complaints(browser) == []


def test_many_rows(browser: Browser, ours: Callable[[str], str]) -> None:
    browser.get(ours("iris") + "/docs")
    text = ",".join(IRIS) + "\n6.1,2.8,4.7,1.2\n5,3,1.5,0.2\n"
    element(browser, "#csv").clear()
    element(browser, "#csv").send_keys(text)
    element(browser, "#csv").send_keys(Keys.CONTROL, Keys.ENTER)
    wait_for(browser, "#status-many", "200")
    rows = browser.find_elements(By.CSS_SELECTOR, "#answer-many tbody tr")
    assert [row.text.split() for row in rows] == [["6.1", "2.8", "4.7", "1.2", "1"], ["5", "3", "1.5", "0.2", "0"]]
    element(browser, "#csv").send_keys("1,2\n")
    element(browser, "#send-many").click()
    assert "row 2: expected 4 values" in wait_for(browser, "#answer-many", "expected")
    assert element(browser, "#csv").get_attribute("aria-invalid") == "true"


def test_probabilities(browser: Browser, ours: Callable[[str], str]) -> None:
    browser.get(ours("iris") + "/docs")
    element(browser, "#method option:nth-child(2)").click()
    element(browser, "#send").click()
    assert "predicted_class" in wait_for(browser, "#answer", "probabilities")
    assert '"predict_method": "predict_proba"' in element(browser, "#curl").get_attribute("textContent")


def test_every_type_of_column(browser: Browser, ours: Callable[[str], str]) -> None:
    browser.get(ours("typed") + "/docs")
    values = {
        "small": "7",
        "big": "9007199254740993",
        "single": "0.5",
        "double": "1e300",
        "text": 'a "b"\'',
        "blob": "AP8=",
    }
    for name, value in {**values, "when": "2024-02-29T23:59:59"}.items():
        fill(browser, name, value)
    element(browser, "#send").click()
    answer = wait_for(browser, "#answer", "big")
    # All digits of an integer that a browser's numbers don't hold.
    assert "9007199254740993" in answer
    assert complaints(browser) == []
    browser.get(ours("optional") + "/docs")
    fill(browser, "maybe_long", "")
    element(browser, "#send").click()
    wait_for(browser, "#status", "200")


@pytest.mark.parametrize("kind", sorted(BUILDERS.keys() - {"slow_to_load", "waiting", "broken"}))
def test_what_the_page_begins_with_is_answered(browser: Browser, ours: Callable[[str], str], kind: str) -> None:
    browser.get(ours(kind) + "/docs")
    if kind in ("untyped", "untyped_answers", "untyped_echo", "no_signature"):  # it begins with nothing
        element(browser, "textarea").clear()
        text = {"untyped_answers": {"form": "text"}, "no_signature": [[1, 2, 3, 4]]}.get(kind, {"a": 1})
        element(browser, "textarea").send_keys(json.dumps(text))
    element(browser, "#send").click()
    wait_for(browser, "#status", "200 in")
    assert element(browser, "#answer").text
    if element(browser, "#many-section").is_displayed():
        element(browser, "#send-many").click()
        wait_for(browser, "#status-many", "200 in")
    assert complaints(browser) == []


def test_by_keyboard_alone(browser: Browser, ours: Callable[[str], str]) -> None:
    browser.get(ours("iris") + "/docs")
    element(browser, "body").send_keys(Keys.TAB)
    seen = []
    for _ in range(6):
        active = browser.switch_to.active_element
        seen.append(active.get_attribute("name") or active.get_attribute("id"))
        active.send_keys(Keys.TAB)
    assert seen == [*IRIS, "method", "send"]
    field(browser, "sepal length (cm)").send_keys(Keys.ENTER)
    wait_for(browser, "#status", "200")


def test_on_a_phone_and_in_the_dark(browser: Browser, ours: Callable[[str], str]) -> None:
    def colors() -> tuple[str, str]:
        style = "getComputedStyle(document.body)"
        return tuple(browser.execute_script(f"return [{style}.backgroundColor, {style}.color]"))

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        browser.get(ours("iris") + "/docs")
        # Nothing makes the page wider than the screen.
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360
        light = colors()
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        dark = colors()
        assert light != dark
        assert [_brightness(color) > 128 for color in (*light, *dark)] == [True, False, False, True]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def _brightness(color: str) -> float:
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


def test_behind_a_proxy(browser: Browser) -> None:
    service = Service(BatchLimits(), "iris")
    service.use(load_model(model_path("iris")))
    with in_thread(make_app(service, "/models/iris")) as url:
        for path in ("/models/iris", "/models/iris/", "/models/iris/docs"):
            browser.get(url + path)
            element(browser, "#send").click()
            assert "scores" in wait_for(browser, "#answer", "scores")
            assert f"{url}/models/iris/predict" in element(browser, "#curl").get_attribute("textContent")


def test_it_tells_what_the_model_is(browser: Browser, tmp_path: Path) -> None:
    with serving(model_path("iris"), WORKERS=1, MODEL_NAME="flowers") as served:
        browser.get(served.url)
        about = element(browser, "#about").text
        for part in ("sklearn", "predict_proba", "Darwin Serve Runtime", "bytes in"):
            assert part in about
        files = element(browser, "#files").get_attribute("textContent")
        assert "MLmodel" in files
        assert "double" in element(browser, "#signature").get_attribute("textContent")
        assert element(browser, "h1").text == "flowers"
        element(browser, "#method option:nth-child(2)").click()
        element(browser, "#send").click()
        wait_for(browser, "#answer", "predicted_class")
        if os.environ.get("SCREENSHOT"):  # for the README
            browser.save_screenshot(str(SCREENSHOT))


# Behind keys, certificates and other origins

KEY = "correct-horse-battery-staple"


class Elsewhere(BaseHTTPRequestHandler):
    """A page of another origin."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title>")

    def log_message(self, *_: object) -> None:
        pass


def fetched(browser: Browser, url: str, headers: dict[str, str], body: str | None) -> Any:
    """The status, the id and the text that a script in the page gets of `url`, or the name of the error."""
    script = """
        const [url, headers, body, done] = arguments;
        fetch(url, body === null ? {headers} : {method: "POST", headers, body})
          .then(async answer => done([answer.status, answer.headers.get("X-Request-ID"), await answer.text()]))
          .catch(error => done([error.name, "", ""]));
    """
    return browser.execute_async_script(script, url, headers, body)


def test_behind_keys_over_https_and_from_another_origin(tmp_path: Path) -> None:
    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1")
    cert = issued.cert_chain_pems[0].bytes()
    mount = Mount(tmp_path / "secret", tls_crt=cert, tls_key=issued.private_key_pem.bytes(), ca_crt=ca.cert_pem.bytes())
    (tmp_path / "keys").write_text(KEY)
    # The browser trusts that one key, and verifies all else as ever.
    pinned = base64.b64encode(hashlib.sha256(public_key(cert)).digest()).decode()
    with contextlib.ExitStack() as stack:
        friend, stranger = (stack.enter_context(http_server(Elsewhere)) for _ in range(2))
        settings: dict[str, Any] = {
            "API_KEYS_FILE": tmp_path / "keys",
            "TLS_CERT_FILE": mount / "tls.crt",
            "TLS_KEY_FILE": mount / "tls.key",
            "CORS_ORIGINS": friend,
        }
        options = {"verify": str(mount / "ca.crt")}
        served = stack.enter_context(serving(model_path("iris"), WORKERS=1, options=options, **settings))
        switch = f"ignore-certificate-errors-spki-list={pinned}"
        browser = stack.enter_context(chromium(tmp_path / "profile", switch))

        # Pages of others first, for a login stays with a browser.
        bearer = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        body = json.dumps({"features": IRIS})
        browser.get(friend)
        status, request_id, text = fetched(browser, f"{served.url}/predict", bearer, body)
        assert (status, json.loads(text)) == (200, {"scores": [1]})
        assert request_id, "what is exposed can be read"
        assert fetched(browser, f"{served.url}/schema", {}, None)[0] == 401
        assert fetched(browser, f"{served.url}/nowhere", bearer, None)[0] == 404
        browser.get(stranger)
        assert fetched(browser, f"{served.url}/predict", bearer, body) == ["TypeError", "", ""]

        # The page is not shown without a login, nor with a wrong one.
        browser.get(f"{served.url}/docs")
        assert browser.find_elements(By.CSS_SELECTOR, "#send") == []
        browser.get(served.url.replace("//", "//me:not-one-of-the-keys@") + "/docs")
        assert browser.find_elements(By.CSS_SELECTOR, "#send") == []

        # A login goes along with what the page asks for, also where it stands in the address.
        browser.get_log("browser")
        for address in (served.url.replace("//", f"//me:{KEY}@"), served.url):
            browser.get(f"{address}/docs")
            element(browser, "#send").click()
            assert '"scores"' in wait_for(browser, "#answer", "scores")
            element(browser, "#send-many").click()
            wait_for(browser, "#status-many", "200")
        assert complaints(browser) == []
        element(browser, "#routes a").click()
        wait_until(lambda: "openapi.json" in browser.current_url, "the document")
        assert "securitySchemes" in element(browser, "body").text

        # What it shows for a terminal and for Python works there.
        browser.get(f"{served.url}/docs")
        curl, python = (element(browser, at).get_attribute("textContent") for at in ("#curl", "#python"))
        assert KEY not in curl + python
        environ = {"API_KEY": KEY, "PATH": os.environ["PATH"]}
        assert curl.startswith("# If the server's certificate is of a CA of your own: --cacert ca.crt\ncurl https://")
        curl = curl.replace("\ncurl ", f"\n{program('curl', 'curl')} -s --cacert {mount / 'ca.crt'} ")
        said = subprocess.run(["sh", "-c", curl], env=environ, capture_output=True, text=True, check=True)
        assert json.loads(said.stdout) == {"scores": [0]}
        python = python.replace("json=body", f"json=body, verify={str(mount / 'ca.crt')!r}")
        said = subprocess.run([sys.executable, "-c", python], env=environ, capture_output=True, text=True, check=True)
        assert said.stdout == "{'scores': [0]}\n"
        assert KEY not in served.log


HTML = {"Accept": "text/html, */*;q=0.8"}
NAMESPACES = {"http://www.w3.org/2000/svg", "https://json-schema.org/draft/2020-12/schema"}


@pytest.mark.parametrize("kind", sorted(BUILDERS.keys() - {"slow_to_load", "waiting", "broken"}))
def test_nothing_served_names_another_host(ours: Callable[[str], str], kind: str) -> None:
    url = ours(kind)
    for path in ("/", "/docs", "/openapi.json", "/schema", "/metrics", "/v2", "/v2/models/model"):
        text = requests.get(url + path, headers=HTML, timeout=60).text
        assert set(re.findall(r"(?:https?:)?//[\w.-]+\.[\w./-]+", text)) - NAMESPACES == set(), path


def test_what_a_model_is_called_can_not_run(ours: Callable[[str], str]) -> None:
    answer = requests.get(ours("iris") + "/", headers=HTML, timeout=60)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    [described] = re.findall(r'<script type="application/json" id="model">(.*?)</script>', answer.text, re.DOTALL)
    assert "<" not in described
    assert json.loads(described)["name"] == "model"
