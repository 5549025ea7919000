# docker build -t localhost:5000/serve-md-runtime:0.1.0 .
#
# BASE_IMAGE          the Python to build on; models that were pickled load only in the minor version they were made with
# FLAVORS             which model libraries to bring, each a lock in requirements/, such as "sklearn pytorch"
# MODEL_REQUIREMENTS  a model's own requirements.txt, copied to requirements/, such as requirements/iris.txt
# PIP_INDEX_URL       where to install from, if not PyPI; PIP_TRUSTED_HOST names it when its certificate is not known here
# REVISION            the commit this is built from, for the image's labels
#
# After `make wheelhouse` it builds without a network.

# Slim, not Alpine: numpy, scipy and the model libraries publish their wheels for glibc.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Arguments of this stage leave no trace in the image: neither a private index nor its credentials.
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG FLAVORS="sklearn lightgbm xgboost catboost"
ARG MODEL_REQUIREMENTS
WORKDIR /build
# One environment for pip and what lists the packages, which stays behind, and one to ship.
RUN python3 -m venv tool && python3 -m venv --without-pip /venv
COPY requirements/ requirements/
COPY wheelhouse/ wheelhouse/
COPY image/install.sh image/sbom.sh image/licences.py ./
RUN ./install.sh
RUN ./sbom.sh
# Nothing can be compiled later, on a read-only root. By hash, because not every builder and registry keeps file times.
# Some packages have templates among their modules, which are no Python.
RUN PYTHONHASHSEED=0 /venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /venv/lib || true
COPY *.py /app/
COPY darwin_runtime/ /app/darwin_runtime/
# Whatever umask the files were checked out with, any user must be able to read them.
RUN chmod -R u=rwX,go=rX /app && \
    PYTHONHASHSEED=0 /venv/bin/python -m compileall -q --invalidation-mode checked-hash /app && \
    mkdir /scripts && \
    ln -s /app/download.py /scripts/download_model.py && \
    ln -s /app/cleanup.py /scripts/cleanup_cache.py

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG REVISION
LABEL org.opencontainers.image.title="Darwin Serve Runtime" \
      org.opencontainers.image.description="Download, serve and cache MLflow models on Kubernetes" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
# The official images come without the standard library's bytecode; every start would compile what it imports again.
RUN python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))' | \
    PYTHONHASHSEED=0 xargs python3 -m compileall -q -x '/(site-packages|dist-packages|test|tests|lib2to3|idlelib|turtledemo)/'
COPY --from=build /venv /venv
COPY --from=build /sbom /sbom
COPY --from=build /scripts /scripts
COPY --from=build /app /app
# HOME: a user that only Kubernetes knows has none, and /tmp is what can be written.
ENV PATH=/venv/bin:${PATH} \
    LD_LIBRARY_PATH=/venv/lib \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
# A number, because Kubernetes can't tell that a name is not root's (runAsNonRoot). Group 0, because OpenShift runs
# containers as a random user of that group; nothing here needs more than to be readable.
USER 10001:0
EXPOSE 8000
CMD ["python", "/app/darwin_serve.py"]
