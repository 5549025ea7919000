#!/bin/sh
# Lists the packages in /venv, with versions, licences and where each is from: /sbom/packages.cdx.json (CycloneDX) for
# tools, /sbom/licences.txt for people. The Dockerfile runs it.
set -eu

mkdir /sbom
# Reproducible: without the time and a random serial number.
tool/bin/cyclonedx-py environment --output-reproducible --output-file /sbom/packages.cdx.json /venv/bin/python
/venv/bin/python -I licences.py > /sbom/licences.txt
