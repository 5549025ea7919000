"""The Kubernetes client against a real HTTPS server: trust, tokens, paging, retries, and what its errors say."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import k8s_client
from darwin_runtime.errors import ApiError, NotInCluster
from k8s_client import Client
from tests.support import apiserver
from tests.support.apiserver import ApiServer, Certificate, Fault, issue, ok, pod

STRAY = ("PROXY", "CA_BUNDLE", "SSL_CERT", "NETRC")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, CA or .netrc of the machine that runs the tests."""
    for name in list(os.environ):
        if any(part in name.upper() for part in STRAY):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path / "serviceaccount") as server:
        yield server


@pytest.fixture
def client(api: ApiServer) -> Iterator[Client]:
    with Client.in_cluster(api.environ, api.directory) as client:
        client.backoff = 0.001
        yield client


def names(client: Client, namespace: str = "default") -> list[str]:
    return [pod["metadata"]["name"] for pod in client.list_pods(namespace)]


def list_from(server: ApiServer) -> list[str]:
    with Client.in_cluster(server.environ, server.directory) as client:
        client.backoff = 0.001
        return names(client)


# In the cluster or not


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """A service account's directory without a server behind it."""
    directory = tmp_path / "account"
    apiserver.service_account(directory, trustme.CA().cert_pem.bytes())
    return directory


INSIDE = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize(("value", "state"), [(None, "is not set"), ("", "is empty"), (" ", "is empty")])
def test_missing_and_empty_variables_are_told_apart(name: str, value: str | None, state: str, account: Path) -> None:
    environ = {key: text for key, text in (INSIDE | {name: value}).items() if text is not None}
    with pytest.raises(NotInCluster, match=f"{name} {state}; .*run this in a pod"):
        Client.in_cluster(environ, account)


@pytest.mark.parametrize("name", ["token", "ca.crt"])
def test_missing_and_empty_files_are_told_apart(name: str, account: Path) -> None:
    file = account / name
    file.write_text("\n")
    with pytest.raises(NotInCluster, match=f"{file} is empty; .*automountServiceAccountToken"):
        Client.in_cluster(INSIDE, account)
    file.unlink()
    with pytest.raises(NotInCluster, match=f"{file} does not exist; .*automountServiceAccountToken"):
        Client.in_cluster(INSIDE, account)
    file.mkdir()
    with pytest.raises(NotInCluster, match=rf"{file} cannot be read \(Is a directory\)"):
        Client.in_cluster(INSIDE, account)


def test_a_ca_file_that_is_no_certificate_is_named(account: Path) -> None:
    (account / "ca.crt").write_text("not PEM")
    with pytest.raises(NotInCluster, match=rf"{account / 'ca.crt'} holds no PEM certificate"):
        Client.in_cluster(INSIDE, account)


@pytest.mark.parametrize("text", [b"se\ncret", b"se\xffcret", "sécret".encode()])
def test_a_token_no_header_can_carry_is_refused_without_quoting_it(text: bytes, account: Path) -> None:
    (account / "token").write_bytes(text)
    with pytest.raises(NotInCluster, match="does not hold a token") as caught:
        Client.in_cluster(INSIDE, account)
    assert "cret" not in str(caught.value)


def test_the_namespace_is_the_service_accounts(account: Path) -> None:
    (account / "namespace").write_text("models\n")
    assert k8s_client.namespace(account) == "models"
    (account / "namespace").unlink()
    with pytest.raises(NotInCluster, match=f"{account / 'namespace'} does not exist"):
        k8s_client.namespace(account)


def test_the_service_account_is_where_kubernetes_mounts_it() -> None:
    assert Path("/var/run/secrets/kubernetes.io/serviceaccount") == k8s_client.SERVICE_ACCOUNT


def test_an_ipv6_host_works_and_gets_brackets(tmp_path: Path) -> None:
    with ApiServer(tmp_path / "six", host="::1") as server:
        server.pods = [pod("a")]
        assert server.environ["KUBERNETES_SERVICE_HOST"] == "::1"
        assert list_from(server) == ["a"]
        assert server.requests[0].headers["host"] == server.url.removeprefix("https://")


def test_brackets_already_there_are_kept(account: Path) -> None:
    with Client.in_cluster(INSIDE | {"KUBERNETES_SERVICE_HOST": "[fd00::1]"}, account) as client:
        assert client.url == "https://[fd00::1]:443"


# Trust


def test_a_server_of_another_ca_is_refused_at_once_and_gets_no_token(api: ApiServer) -> None:
    ca = api.directory / "ca.crt"
    ca.write_bytes(trustme.CA().cert_pem.bytes())
    with pytest.raises(ApiError) as caught:
        list_from(api)
    assert caught.value.code == 0
    assert caught.value.reason == "SSLCertVerificationError"
    assert f"{ca} does not verify {api.url}" in str(caught.value)
    assert api.requests == []
    assert api.connections == 1


def test_a_certificate_for_another_host_is_refused(tmp_path: Path) -> None:
    with ApiServer(tmp_path / "other", certificate=issue("kubernetes.default.svc")) as server:
        with pytest.raises(ApiError, match="IP address mismatch"):
            list_from(server)
        assert server.requests == []


def test_public_cas_are_not_trusted(api: ApiServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    public = tmp_path / "public.pem"
    public.write_bytes(api.certificate.ca)
    (api.directory / "ca.crt").write_bytes(trustme.CA().cert_pem.bytes())
    monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(public))
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(public))
    with pytest.raises(ApiError, match="does not verify"):
        list_from(api)


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_ca_bundle_variables_have_no_effect(
    name: str, api: ApiServer, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other.pem"
    other.write_bytes(trustme.CA().cert_pem.bytes())
    monkeypatch.setenv(name, str(other))
    api.pods = [pod("a")]
    assert names(client) == ["a"]


@pytest.mark.parametrize("variable", ["HOME", "NETRC"])
def test_netrc_does_not_replace_the_token(
    variable: str, api: ApiServer, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    netrc = home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv(variable, str(home if variable == "HOME" else netrc))
    assert names(client) == []
    assert api.requests[0].headers["authorization"] == f"Bearer {api.token}"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_proxy_variables_have_no_effect(name: str, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as dead:  # bound and not listening: connecting is refused
        dead.bind(("127.0.0.1", 0))
        monkeypatch.setenv(name, f"http://127.0.0.1:{dead.getsockname()[1]}")
        assert names(client) == []


def old_fashioned() -> Certificate:
    """As some clusters' tools make them: a CA without key usage, and a certificate without an authority key."""

    def signed(name: str, extension: x509.ExtensionType, critical: bool, key: ec.EllipticCurvePrivateKey) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder(
            issuer_name=common_name("old CA"),
            subject_name=common_name(name),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(days=1),
            not_valid_after=now + datetime.timedelta(days=1),
        )
        made = builder.add_extension(extension, critical).sign(ca_key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = signed("old CA", x509.BasicConstraints(ca=True, path_length=None), False, ca_key)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))])
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Certificate(private + signed("server", address, False, key), ca)


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def test_a_ca_that_strict_x509_refuses_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = ssl.create_default_context

    def as_in_python_3_13(*, cafile: str) -> ssl.SSLContext:
        context = default(cafile=cafile)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", as_in_python_3_13)
    with ApiServer(tmp_path / "old", certificate=old_fashioned()) as server:
        strict = ssl.create_default_context(cafile=str(server.directory / "ca.crt"))
        address = server.environ["KUBERNETES_SERVICE_HOST"], int(server.environ["KUBERNETES_SERVICE_PORT"])
        with socket.create_connection(address) as plain, pytest.raises(ssl.SSLCertVerificationError):
            strict.wrap_socket(plain, server_hostname="127.0.0.1")
        assert list_from(server) == []


# Tokens


def test_the_token_is_read_for_each_request(api: ApiServer, client: Client) -> None:
    assert names(client) == []
    api.rotate("second-token")
    assert names(client) == []
    assert [request.headers["authorization"] for request in api.requests] == [
        "Bearer first-token",
        "Bearer second-token",
    ]


def test_a_token_rotated_on_the_way_is_read_again(api: ApiServer, client: Client) -> None:
    def rotated(handler: apiserver.Handler) -> None:
        api.rotate("second-token")
        ok(handler)

    api.faults = [rotated]
    api.pods = [pod("a")]
    assert names(client) == ["a"]
    assert len(api.requests) == 2


def test_a_token_refused_twice_is_an_error(api: ApiServer, client: Client) -> None:
    api.token = "another's"
    with pytest.raises(ApiError, match=r"401 Unauthorized: .*does the service account still exist") as caught:
        names(client)
    assert (caught.value.code, caught.value.reason) == (401, "Unauthorized")
    assert len(api.requests) == 2


def test_a_token_that_has_gone_is_named(api: ApiServer, client: Client) -> None:
    (api.directory / "token").unlink()
    with pytest.raises(NotInCluster, match="token does not exist"):
        names(client)


def test_403_is_not_retried_and_says_what_to_grant(api: ApiServer, client: Client) -> None:
    api.faults = [apiserver.forbidden()]
    with pytest.raises(ApiError) as caught:
        names(client)
    error = caught.value
    assert (error.code, error.reason, error.details) == (403, "Forbidden", {"kind": "pods"})
    assert error.message.startswith("pods is forbidden: User")
    assert str(error).startswith("Kubernetes API: 403 Forbidden: pods is forbidden: User")
    assert "RoleBinding" in str(error)
    assert len(api.requests) == 1


def test_the_token_shows_in_no_message(api: ApiServer, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = apiserver.reply(f"<p>You sent: Bearer {api.token}</p>", 404, "text/html")
    api.faults = [apiserver.unavailable(), echo]
    with pytest.raises(ApiError, match=r"Bearer \*\*\*") as html:
        names(client)
    api.faults = [apiserver.redirect(f"https://127.0.0.1/?token={api.token}")]
    with pytest.raises(ApiError, match=r"token=\*\*\*") as moved:
        names(client)
    api.faults = [apiserver.status(400, "BadRequest", f"what is {api.token}?")]
    with pytest.raises(ApiError, match=r"what is \*\*\*\?") as refused:
        names(client)
    shown = [repr(client), caplog.text]
    shown += [text for error in (html, moved, refused) for text in (str(error.value), repr(error.value))]
    assert not [text for text in shown if api.token in text]
    assert caplog.records


# The list


def test_pods_come_as_the_server_has_them(api: ApiServer, client: Client) -> None:
    phases = ["Pending", "Running", "Succeeded", "Failed", "Unknown"]
    api.pods = [pod(phase.lower(), phase=phase, env={"A": "1"}, claim="cache") for phase in phases]
    api.pods = [*api.pods, pod("going", deleted="2026-01-01T00:00:00Z"), pod("elsewhere", namespace="other")]
    assert client.list_pods("default") == api.pods[:-1]
    assert api.requests[0].path == "/api/v1/namespaces/default/pods"


def test_pages_are_joined_over_one_connection(api: ApiServer, client: Client) -> None:
    api.pods = [pod(f"p{number}") for number in range(5)]
    client.limit = 2
    assert names(client) == ["p0", "p1", "p2", "p3", "p4"]
    assert [request.query.get("limit") for request in api.requests] == ["2", "2", "2"]
    assert [request.query.get("continue") for request in api.requests] == [None, "continue-0", "continue-1"]
    assert api.connections == 1


def test_an_empty_page_is_not_the_last(api: ApiServer, client: Client) -> None:
    api.pods = [pod("a"), pod("b")]
    api.page_size, api.empty_page_before = 1, 1
    assert names(client) == ["a", "b"]
    assert len(api.requests) == 3


def test_requests_ask_for_500_pods_of_no_particular_version(api: ApiServer, client: Client) -> None:
    api.pods = [pod("a"), pod("b")]
    api.page_size = 1
    names(client)
    assert api.requests[0].query == {"limit": "500"}
    assert api.requests[1].query == {"limit": "500", "continue": "continue-0"}


@pytest.mark.parametrize("namespace", ["a/b?c#d", "x%2e%2e"])
def test_the_namespace_cannot_leave_its_place_in_the_path(namespace: str, api: ApiServer, client: Client) -> None:
    api.pods = [pod("a"), pod("b", namespace=namespace)]
    assert names(client, namespace) == ["b"]


@pytest.mark.parametrize("namespace", ["", ".", ".."])
def test_what_would_be_another_path_is_no_namespace(namespace: str, api: ApiServer, client: Client) -> None:
    with pytest.raises(ValueError, match="is not a namespace"):
        client.list_pods(namespace)
    assert api.requests == []


def test_a_list_that_expires_is_begun_again(api: ApiServer, client: Client) -> None:
    api.pods = [pod("a"), pod("b"), pod("c")]
    api.page_size = 1

    def changed(handler: apiserver.Handler) -> None:
        api.pods = [pod("new"), pod("c")]
        apiserver.expired()(handler)

    api.faults = [ok, changed]
    assert names(client) == ["new", "c"]
    # The third is a fresh list; the token that the 410 offered ("continue-1") is not among them.
    assert [request.query.get("continue") for request in api.requests] == [None, "continue-0", None, "continue-2"]


def test_a_list_that_expires_time_and_again_is_an_error(api: ApiServer, client: Client) -> None:
    api.pods = [pod("a"), pod("b")]
    api.page_size = 1
    api.faults = [ok, apiserver.expired()] * 10
    with pytest.raises(ApiError, match="410 Expired: The provided continue parameter is too old"):
        names(client)
    assert len(api.requests) == 2 * (k8s_client.RESTARTS + 1)


def test_a_list_without_end_meets_the_deadline(api: ApiServer, client: Client) -> None:
    page = {"kind": "PodList", "metadata": {"continue": "on-and-on"}, "items": []}
    api.faults = [apiserver.reply(json.dumps(page))] * 100_000
    client.deadline = 0.5
    with pytest.raises(ApiError, match=r"past the 0\.5 s allowed"):
        names(client)
    assert len(api.requests) > 1


# Answers that are no list


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("\x00garbage", "application/octet-stream"),
        ("<html>Sign in</html>", "text/html"),
        ('{"kind": "PodList", "metadata": {}', "application/json"),
        ("[]", "application/json"),
        ("", "application/json"),
        ('{"kind": "ServiceList", "metadata": {}, "items": []}', "application/json"),
        ('{"metadata": {}, "items": []}', "application/json"),
        ('{"kind": "PodList", "metadata": {}}', "application/json"),
        ('{"kind": "PodList", "metadata": {}, "items": null}', "application/json"),
        ('{"kind": "PodList", "metadata": {}, "items": ["a"]}', "application/json"),
        ('{"kind": "PodList", "items": []}', "application/json"),
        ('{"kind": "PodList", "metadata": {"continue": 1}, "items": []}', "application/json"),
    ],
)
def test_an_answer_that_is_no_pod_list_is_quoted(body: str, kind: str, api: ApiServer, client: Client) -> None:
    api.faults = [apiserver.reply(body, kind=kind)]
    with pytest.raises(ApiError) as caught:
        names(client)
    assert caught.value.code == 200
    assert f"expected a PodList, got {len(body)} bytes ({kind}): {body!r}" in str(caught.value)
    assert len(api.requests) == 1


@pytest.mark.parametrize("character", ["x", "["])  # the second exhausts the JSON parser's recursion
def test_a_long_answer_is_quoted_in_part(character: str, api: ApiServer, client: Client) -> None:
    api.faults = [apiserver.reply(character * 200_000)]
    with pytest.raises(ApiError, match=r"200 OK: .*200000 bytes") as caught:
        names(client)
    assert len(str(caught.value)) < 400


def test_a_status_under_200_is_an_error(api: ApiServer, client: Client) -> None:
    api.faults = [apiserver.status(500, "InternalError", "etcd is away", http=200)]
    with pytest.raises(ApiError, match="200 InternalError: etcd is away"):
        names(client)


def test_a_page_without_kind_spoils_the_list(api: ApiServer, client: Client) -> None:
    api.pods = [pod("a"), pod("b")]
    api.page_size = 1
    api.faults = [ok, apiserver.reply('{"items": []}')]
    with pytest.raises(ApiError, match="expected a PodList"):
        names(client)


def test_redirects_are_not_followed(api: ApiServer, client: Client, tmp_path: Path) -> None:
    # The same certificate, so that following would work.
    with ApiServer(tmp_path / "elsewhere", certificate=api.certificate) as elsewhere:
        api.faults = [apiserver.redirect(f"{elsewhere.url}/api/v1/namespaces/default/pods")]
        with pytest.raises(ApiError, match=f"302 Found: redirects to '{elsewhere.url}.*not followed"):
            names(client)
        assert elsewhere.connections == 0
    assert len(api.requests) == 1


def test_a_missing_path_is_an_error(client: Client) -> None:
    client.url += "/prefix"
    with pytest.raises(ApiError, match="404 NotFound: the server could not find"):
        names(client)


def test_a_port_that_is_no_number_is_an_error(api: ApiServer) -> None:
    client = Client.in_cluster(api.environ | {"KUBERNETES_SERVICE_PORT": "https"}, api.directory)
    with client, pytest.raises(ApiError, match=r"https://127\.0\.0\.1:https") as caught:
        names(client)
    assert caught.value.code == 0


# Retries

PASSING: dict[str, Fault] = {
    "429": apiserver.throttled(),
    "429 plain": apiserver.reply("Too many requests, please try again later.", 429, "text/plain"),
    "500": apiserver.status(500, "InternalError", "oops"),
    "503": apiserver.unavailable(),
    "503 odd": apiserver.reply('{"kind": "Status", "details": ["not", "an", "object"]}', 503),
    "503 html": apiserver.reply("<h1>no backend</h1>", 503, "text/html"),
    "504": apiserver.status(504, "Timeout", "the request did not complete within the allotted time"),
    "reset": apiserver.reset,
    "truncated": apiserver.truncated,
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_tried_again(
    fault: Fault, api: ApiServer, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    api.pods = [pod("a"), pod("b")]
    api.page_size = 1
    api.faults = [ok, fault, fault]
    assert names(client) == ["a", "b"]
    assert len(api.requests) == 4
    assert caplog.text.count("trying again in") == 2


@pytest.mark.parametrize("header", [None, "0"])
@pytest.mark.parametrize("seconds", [None, 0])
def test_a_shorter_pause_than_ours_is_honoured(
    header: str | None, seconds: int | None, api: ApiServer, client: Client
) -> None:
    """With `backoff` of an hour only the server's own word lets a second request happen."""
    client.backoff, client.deadline = 3600, 5
    api.faults = [apiserver.throttled(header, seconds)]
    if header is None and seconds is None:
        with pytest.raises(ApiError, match="429 TooManyRequests"):
            names(client)
    else:
        assert names(client) == []


@pytest.mark.parametrize(("header", "seconds"), [("3600", None), (None, 3600), ("3600", 0)])
def test_a_longer_pause_than_the_deadline_is_not_begun(
    header: str | None, seconds: int | None, api: ApiServer, client: Client
) -> None:
    api.faults = [apiserver.throttled(header, seconds)]
    with pytest.raises(ApiError, match=r"another try, in 3600.0 s, would be past the 60 s allowed"):
        names(client)
    assert len(api.requests) == 1


@pytest.mark.parametrize("header", ["soon", "-1", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_pause_that_is_no_number_is_ours(header: str, api: ApiServer, client: Client) -> None:
    api.faults = [apiserver.throttled(header)]
    assert names(client) == []


def test_pauses_grow_and_differ(api: ApiServer, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    api.faults = [apiserver.unavailable()] * 6
    names(client)
    pauses = [record.args[-1] for record in caplog.records if isinstance(record.args, tuple)]
    for tries, pause in enumerate(pauses):
        assert isinstance(pause, float)
        assert client.backoff * 2**tries / 2 <= pause <= client.backoff * 2**tries
    assert len(pauses) == 6
    assert len({pause / 2**tries for tries, pause in enumerate(pauses) if isinstance(pause, float)}) > 1


def test_a_silent_server_is_asked_again(api: ApiServer, client: Client) -> None:
    client.timeout = (5, 0.3)
    api.faults = [apiserver.silence]
    assert names(client) == []
    assert len(api.requests) > 1


def test_a_silent_server_meets_the_deadline(api: ApiServer, client: Client) -> None:
    api.faults = [apiserver.silence] * 100
    client.timeout, client.deadline = (3600, 3600), 0.3
    with pytest.raises(ApiError, match=r"no answer, TimeoutError: https://.*gave up") as caught:
        names(client)
    assert caught.value.code == 0


def test_the_last_cause_is_told_when_time_is_up(api: ApiServer, client: Client) -> None:
    busy = apiserver.status(503, "ServiceUnavailable", "busy", details={"retryAfterSeconds": 3600})
    api.faults = [apiserver.reset, busy]
    with pytest.raises(ApiError, match="503 ServiceUnavailable: busy; gave up") as caught:
        names(client)
    assert caught.value.code == 503
    assert caught.value.details == {"retryAfterSeconds": 3600}
    assert len(api.requests) == 2


def test_nobody_there_is_tried_until_the_deadline(account: Path) -> None:
    with socket.socket() as dead:  # bound and not listening: connecting is refused
        dead.bind(("127.0.0.1", 0))
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(dead.getsockname()[1])}
        with Client.in_cluster(environ, account) as client:
            client.deadline, client.backoff = 0.1, 0.001
            message = f"no answer, ConnectionRefusedError: {client.url}: .*Connection refused; gave up"
            with pytest.raises(ApiError, match=message) as caught:
                names(client)
    assert caught.value.code == 0
