#!/bin/sh
# Installs into /venv what the image is to have, and beside pip what lists it (sbom.sh); the Dockerfile runs it.
#
# FLAVORS             model libraries, each a lock in requirements/
# MODEL_REQUIREMENTS  a model's own list, whose versions win over the flavors'
set -eu

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

pip() {
    tool/bin/pip --python /venv/bin/python "$@"
}

# Wheels only: slim images have no compiler, and nothing but what is asked for may run code here.
wheels="--no-compile --only-binary=:all: --progress-bar=off"

if ls wheelhouse/*.whl > /dev/null 2>&1; then
    echo "wheelhouse/ has wheels, so nothing is taken from an index; empty it, or fill it anew with make wheelhouse"
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=/build/wheelhouse
fi

locks="-r requirements/runtime.txt"
for flavor in ${FLAVORS}; do
    if [ ! -e "requirements/${flavor}.txt" ]; then
        echo "there is no flavor ${flavor} (FLAVORS=${FLAVORS}), there are these:" requirements/*.txt >&2
        exit 1
    fi
    locks="${locks} -r requirements/${flavor}.txt"
done
# shellcheck disable=SC2086  # they are several words
pip install ${wheels} --require-hashes --no-deps ${locks}
# shellcheck disable=SC2086
tool/bin/pip install ${wheels} --quiet --require-hashes --no-deps -r requirements/sbom.txt

# The lines of the model's list that name one of these packages, or with -v all others.
lines() {
    grep -iE "$@" requirements/.joined.txt || [ $? = 1 ]
}

if [ -n "${MODEL_REQUIREMENTS:-}" ]; then
    if [ ! -f "${MODEL_REQUIREMENTS}" ]; then
        echo "there is no MODEL_REQUIREMENTS=${MODEL_REQUIREMENTS}: copy the file to requirements/" >&2
        exit 1
    fi
    # Beside the others, as it may name them. One requirement a line, however it was written.
    sed -e 's/\r$//' -e ':more' -e '/\\$/{N; s/\\\n//; b more' -e '}' "${MODEL_REQUIREMENTS}" > requirements/.joined.txt
    # CatBoost without what it asks for, as in its lock. The image's own MLflow serves the model, whichever logged it.
    lines '^catboost([^a-z0-9-]|$)' > requirements/.alone.txt
    lines -v '^(mlflow|mlflow-skinny|catboost)([^a-z0-9-]|$)' > requirements/.model.txt
    # These have builds without CUDA by another name, which are the same files.
    for library in xgboost tensorflow; do
        if [ -n "$(lines "^${library}([^a-z0-9-]|$)")" ]; then pip uninstall --yes --quiet "${library}-cpu"; fi
    done
    if [ -s requirements/.alone.txt ]; then
        # shellcheck disable=SC2086
        pip install ${wheels} --no-deps -r requirements/.alone.txt
    fi
    # What is there takes part, so that what no longer fits together is an error: by name, and where something that a
    # package asks for was left out on purpose (`make lock`), by what it asks for of the rest.
    pip list --format=freeze | sed -n '/^catboost=/d; /^mlflow-skinny=/d; s/==.*//p' > present.txt
    cat /venv/lib/python3*/site-packages/catboost-*/METADATA /venv/lib/python3*/site-packages/mlflow_skinny-*/METADATA \
        2> /dev/null | sed -n '/; *extra/d; s/^Requires-Dist: //p' > asked.txt
    # shellcheck disable=SC2086
    pip install ${wheels} -r requirements/.model.txt -r present.txt -c asked.txt
fi

cd /venv/lib/python3*/site-packages
# The big libraries' own tests are a fifth of the image, and nothing imports them.
for library in numpy pandas scipy sklearn; do
    if [ -d "${library}" ]; then find "${library}" -type d -name tests -prune -exec rm -r {} +; fi
done
# MLflow asks whether there is a databricks.agents, and is not prepared for there being no databricks to look into.
mkdir -p databricks
# LightGBM's wheel counts on the system's OpenMP library, which slim images lack. scikit-learn's brings it along;
# sharing that one also keeps two thread pools from fighting over the CPU.
for library in "${PWD}"/scikit_learn.libs/libgomp*.so*; do
    if [ -e "${library}" ]; then ln -s "${library}" /venv/lib/libgomp.so.1; fi
done
if [ -d lightgbm ] && [ ! -e /venv/lib/libgomp.so.1 ]; then
    echo "LightGBM needs the OpenMP library that scikit-learn brings: add sklearn to FLAVORS, or scikit-learn to the list" >&2
    exit 1
fi
