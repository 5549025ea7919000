#!/bin/sh
# Lists the packages in /venv, with versions, licences and where each is from: /sbom/packages.cdx.json (CycloneDX) for
# tools, /sbom/licences.txt for people. The Dockerfile runs it.
set -eu

if ls wheelhouse/*.whl > /dev/null 2>&1; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=/build/wheelhouse
fi
tool/bin/pip install --disable-pip-version-check --no-cache-dir --quiet \
    --only-binary=:all: --require-hashes --no-deps -r requirements/sbom.txt
mkdir /sbom
# Reproducible: without the time and a random serial number.
tool/bin/cyclonedx-py environment --output-reproducible --output-file /sbom/packages.cdx.json /venv/bin/python
/venv/bin/python -I licences.py > /sbom/licences.txt
