"""The vLLM server that generates, for training (`rollout.*`) and for the other commands."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from megafork.config.section import Fraction, Positive, PositiveFloat, Section


class ServerConfig(Section):
    """The settings of a server, and the bounds of a response."""

    max_response_tokens: Positive = Field(20480, description="longer responses are cut")
    temperature: PositiveFloat = Field(1.0, description="sampling temperature")
    url: str | list[str] | None = Field(
        None,
        description="a running server to use, or a list of them; unset or []: start "
        "rollout.servers",
    )
    servers: Positive = Field(
        1, description="servers that a run starts on each node, each with tensor_parallel GPUs"
    )
    api_key_env: str = Field(
        "MEGAFORK_API_KEY",
        description="variable with the key of url and serve",
    )
    python: str | None = Field(None, description="Python that has vLLM; unset: this one")
    tensor_parallel: Positive = Field(1, description="tensor-parallel size of the server")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of the server; unset: the policy's"
    )
    max_num_seqs: Positive = Field(256, description="responses that the server runs at once")
    gpu_memory_utilization: Fraction = Field(0.6, description="GPU memory for the server")
    cpu_threads: Positive | None = Field(
        None,
        description="threads of a CPU server; unset: OMP_NUM_THREADS, else the cores over servers",
    )
    cpu_kv_cache_gib: Positive = Field(1, description="KV cache of a CPU server, GiB")
    startup_timeout_s: PositiveFloat = Field(600.0, description="seconds for the server to come up")
    request_timeout_s: PositiveFloat = Field(3600.0, description="seconds for one request")

    @field_validator("url")
    @classmethod
    def _unset_by_an_empty_list(cls, url: str | list[str] | None) -> str | list[str] | None:
        """TOML has no null: what a resumed run's config holds can be taken away by [] alone."""
        return url or None if isinstance(url, list) else url

    @property
    def urls(self) -> list[str]:
        """The addresses of the servers that run already; empty: servers are to be started."""
        given = [self.url] if isinstance(self.url, str) else self.url or []
        return [url.rstrip("/") for url in given]
