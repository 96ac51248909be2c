# The server from its wheel. TORCH picks the build of torch: cpu, or a CUDA one such as cu130.
#   docker build -t linker .
#   docker build -t linker:cuda --build-arg TORCH=cu130 .
FROM python:3.11-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
ARG TORCH=cpu
# numba's thread layer needs the OpenMP runtime, which slim images leave out.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-cache-dir "torch==2.13.0" \
        --index-url "https://download.pytorch.org/whl/${TORCH}" \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt \
        "$(echo /tmp/wheels/*.whl)[postgres,otel]" \
    && rm -rf /tmp/wheels /tmp/constraints.txt
# Numbers of its own, so that others can be let into its group.
RUN groupadd --gid 10001 linker && useradd --uid 10001 --gid linker --create-home linker \
    && install -d -o linker -g linker /models /state \
    && install -d -o linker -g linker -m 0750 /keys
USER linker
VOLUME ["/models", "/state"]
EXPOSE 8000
HEALTHCHECK --start-period=30s \
    CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=3)"
ENTRYPOINT ["linker"]
# It refuses to start before there is a key:
#   docker run --rm -v state:/state linker keys create me --role admin --state /state
CMD ["serve", "--host", "0.0.0.0", "--models-root", "/models", "--state", "/state"]
