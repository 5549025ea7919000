#!/bin/sh
# Installs into /venv what the image is to have; the Dockerfile runs it.
#
# FLAVORS             model libraries, each a lock in requirements/
# MODEL_REQUIREMENTS  a model's own list, whose versions win over the flavors'
set -eu

pip() {
    tool/bin/pip --python /venv/bin/python --disable-pip-version-check --no-cache-dir "$@"
}

# Wheels only: slim images have no compiler, and nothing but what is asked for may run code here.
wheels="--no-compile --only-binary=:all: --progress-bar=off"

if ls wheelhouse/*.whl > /dev/null 2>&1; then
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

if [ -n "${MODEL_REQUIREMENTS:-}" ]; then
    # The image's own MLflow serves the model, whichever version logged it.
    grep -viE '^mlflow(-skinny)?([^a-z0-9-]|$)' "${MODEL_REQUIREMENTS}" > model.txt || true
    # XGBoost's builds with and without CUDA are the same files under two names.
    if grep -qiE '^xgboost([^a-z0-9-]|$)' model.txt; then
        pip uninstall --yes --quiet xgboost-cpu
    fi
    # What is there takes part, so that what no longer fits together is an error: by name, and where something that a
    # package asks for was left out on purpose (`make lock`), by what it asks for of the rest.
    pip list --format=freeze | sed -n '/^catboost=/d; /^mlflow-skinny=/d; s/==.*//p' > present.txt
    cat /venv/lib/python3*/site-packages/catboost-*/METADATA /venv/lib/python3*/site-packages/mlflow_skinny-*/METADATA \
        2> /dev/null | sed -n '/; *extra/d; s/^Requires-Dist: //p' > asked.txt
    # shellcheck disable=SC2086
    pip install ${wheels} -r model.txt -r present.txt -c asked.txt
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
