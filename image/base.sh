#!/bin/sh
# Makes a base image, a tar of a root file system, of nothing but Debian and its Python: base.sh <file>
#
# For where no registry of base images can be reached, but a Debian mirror can. Needs root, and Debian's debootstrap.
set -eu

work=$(mktemp -d)
trap 'rm -rf "${work}"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "${work}/root" > "${work}/log" || {
    cat "${work}/log" >&2
    exit 1
}
rm -rf "${work}"/root/var/cache/apt/archives/*.deb "${work}"/root/var/lib/apt/lists/* "${work}"/root/dev/*
mkdir -p "$(dirname "$1")"
tar -C "${work}/root" --numeric-owner -cf "$1.part" .
mv "$1.part" "$1"
