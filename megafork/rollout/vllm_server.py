"""Starts and ends one vLLM server on this machine, as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Self

import megafork
from megafork.errors import UserError
from megafork.parallel.addresses import LOOPBACK, loopback_interface
from megafork.parallel.ports import free_port
from megafork.rollout.client import RolloutClient
from megafork.rollout.supervisor import FOLDER, GRACE_S
from megafork.system.extras import missing

_PLUGINS = "megafork.vllm_plugin.routes"
_TWO_TEMPERATURES = "megafork.vllm_plugin.two_temperatures:TwoTemperatureProcessor"
_UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"

# torchrun's variables would make vLLM's workers join the trainer's rendezvous.
_TORCHRUN_VARIABLE = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|PET_.*"
    r"|(TORCH_)?NCCL_ASYNC_ERROR_HANDLING|MEGAFORK_STORE|TORCH_ELASTIC_WORKER_IDENTICAL"
)
_CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binding costs a factor of ten
    "TORCHDYNAMO_DISABLE": "1",
}


@dataclass(eq=False)
class VllmServer:
    """A vLLM server behind an API key; nothing of it is left after `stop()`.

    model_path: a local Hugging Face folder; no tokenizer is needed, only token ids travel.
    device: "cpu" or "cuda". On the CPU kv_cache_gib sizes the cache and cpu_threads is the number
    of threads, on a GPU gpu_memory_utilization sizes the cache. environment: further variables of
    the server, for instance CUDA_VISIBLE_DEVICES.
    python: the interpreter that has vLLM; it may belong to another environment. api_key: unset is a
    random one. two_temperatures: requests may ask for `Sampling.forking_temperatures`; loading any
    logits processor makes vLLM's V1 runner on a GPU wait for each step's tokens. sleeps:
    `RolloutClient.sleep` gives a GPU's memory up.
    """

    model_path: Path
    _: KW_ONLY
    dtype: str
    max_model_len: int
    max_num_seqs: int
    log_path: Path
    device: str = "cpu"
    tensor_parallel: int = 1
    python: str = sys.executable
    startup_timeout_s: float = 600.0
    host: str = LOOPBACK
    port: int | None = None
    api_key: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    gpu_memory_utilization: float = 0.6
    kv_cache_gib: int = 1
    cpu_threads: int = 1
    seed: int = 0
    two_temperatures: bool = False
    sleeps: bool = False
    environment: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.model_path = Path(self.model_path).absolute()
        self.log_path = Path(self.log_path).absolute()
        self._lock = threading.Lock()
        self._state = "new"  # -> "started" -> "stopped"
        self.process_group: int | None = None  # of the supervisor, the server and its workers
        self._process: subprocess.Popen | None = None
        self._import_path: tempfile.TemporaryDirectory | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def client(self, timeout_s: float = 3600.0) -> RolloutClient:
        return RolloutClient(self.url, self.api_key, timeout_s=timeout_s, log_path=self.log_path)

    def start(self) -> None:
        """Start the server and wait until it answers. A server is started once.

        Raises UserError, with the cause and the log's path and nothing left running, when the
        folder is no model, vLLM is not installed, the port is taken, the server exits,
        startup_timeout_s is over, or `stop` was called meanwhile.
        """
        _check_model_folder(self.model_path)
        if self.python == sys.executable and importlib.util.find_spec("vllm") is None:
            raise UserError(
                f"a rollout server needs {missing('vllm') or 'vllm, which is not installed'}"
            )
        self.port = _check_port(self.host, self.port) if self.port else free_port(self.host)
        try:
            asyncio.run(self._wait_until_ready(self._launch()))
        except BaseException:
            self.stop()
            raise

    def _launch(self) -> subprocess.Popen:
        with self._lock:
            if self._state != "new":
                raise UserError(f"the vLLM server was {self._state} before; make a new one")
            self._state = "started"
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self._import_path = tempfile.TemporaryDirectory(prefix="megafork-")
            # The package alone: another environment's Python must see none of our site-packages.
            imports = Path(self._import_path.name)
            (imports / "megafork").symlink_to(Path(megafork.__file__).parent)
            supervisor = [sys.executable, "-m", "megafork.rollout.supervisor"]
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    [*supervisor, *self._command()],
                    stdin=subprocess.PIPE,  # closed with us, which ends the server
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(imports),
                    start_new_session=True,
                )
            self.process_group = self._process.pid
            return self._process

    def stop(self) -> None:
        """End the server's whole process group. Safe at any time, in any thread, and twice."""
        with self._lock:
            self._state = "stopped"
            if self._process is not None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(GRACE_S + 5.0)
                _kill_group(self._process.pid)
                self._process.wait()
                self._process = None
            if self._import_path is not None:
                self._import_path.cleanup()
                self._import_path = None

    def is_running(self) -> bool:
        process = self._process  # `stop` may come in another thread
        return process is not None and process.poll() is None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    async def _wait_until_ready(self, process: subprocess.Popen) -> None:
        client = self.client()
        deadline = time.monotonic() + self.startup_timeout_s
        while not await client.health():
            if process.poll() is not None:
                raise UserError(f"the vLLM server did not start: {self._cause()}")
            if time.monotonic() > deadline:
                raise UserError(
                    f"the vLLM server did not answer within startup_timeout_s="
                    f"{self.startup_timeout_s:g}; allow more time, or see why in: {self._cause()}"
                )
            await asyncio.sleep(0.2)

    def _cause(self) -> str:
        return f"{_last_error(self.log_path)}\n  full log: {self.log_path}"

    def _command(self) -> list[str]:
        options: dict[str, object] = {
            "host": self.host,
            "port": self.port,
            "dtype": self.dtype,
            "max-model-len": self.max_model_len,
            "max-num-seqs": self.max_num_seqs,
            "tensor-parallel-size": self.tensor_parallel,
            "seed": self.seed,
            "served-model-name": "policy",
            "load-format": "safetensors",  # never a pickle
            "generation-config": "vllm",  # nothing of the folder's sampling defaults
            "logprobs-mode": "processed_logprobs",  # log_softmax(logits / temperature)
            "middleware": f"{_PLUGINS}.RolloutMiddleware",
            "worker-extension-cls": f"{_PLUGINS}.WorkerExtension",
            "uvicorn-log-level": "warning",
        }
        if self.two_temperatures:
            options["logits-processors"] = _TWO_TEMPERATURES
        flags = [
            "no-trust-remote-code",
            "skip-tokenizer-init",
            "disable-uvicorn-access-log",
            "disable-log-stats",
        ]
        if self.device == "cpu":
            # A seeded request whose prompt is prefilled in chunks ends the engine on the CPU:
            # vLLM rewinds its generator by an offset that CPU generators do not have.
            flags += ["enforce-eager", "no-enable-chunked-prefill"]
            options["max-num-batched-tokens"] = max(self.max_model_len, 8192)
            if self.tensor_parallel == 1:
                # The worker inside the engine's process: 1.5 times the tokens per CPU second.
                options["distributed-executor-backend"] = _UNIPROC
        else:
            options["gpu-memory-utilization"] = self.gpu_memory_utilization
            if self.sleeps:
                flags.append("enable-sleep-mode")
        command = [self.python, "-m", "megafork.vllm_plugin.serve", str(self.model_path)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        return [*command, *(f"--{flag}" for flag in flags)]

    def _environment(self, imports: Path) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not _TORCHRUN_VARIABLE.fullmatch(k)}
        if self.device == "cpu":
            environment |= _CPU_ENVIRONMENT
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(self.kv_cache_gib)
            environment["OMP_NUM_THREADS"] = str(self.cpu_threads)
        return environment | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
            "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause and update
            "VLLM_API_KEY": self.api_key,
            # Engine and workers are on this machine, and so stays what they say to each other.
            "VLLM_HOST_IP": LOOPBACK,
            "GLOO_SOCKET_IFNAME": loopback_interface(),
            "VLLM_RPC_BASE_PATH": str(imports),  # their sockets, in a folder of this user alone
            "TMPDIR": str(imports),
            FOLDER: str(imports),
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(imports), os.environ.get("PYTHONPATH")])
            ),
            **self.environment,
        }


def _check_model_folder(folder: Path) -> None:
    """Raise UserError for mistakes that vLLM reports after half a minute and in other words."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no model at {folder}: {path} does not exist; give a Hugging Face folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the model again") from error
    if not isinstance(config, dict) or "architectures" not in config:
        raise UserError(f"{path} names no architectures; give a Hugging Face model folder")


def _kill_group(process_group: int, patience_s: float = 3.0) -> None:
    """Send SIGKILL until nothing is left: the group's memory, on a GPU too, is then free."""
    deadline = time.monotonic() + patience_s
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process_group, signal.SIGKILL)
            time.sleep(0.02)


def _check_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"the vLLM server cannot listen on {host}:{port} ({error.strerror}); "
                "choose another port or leave it out"
            ) from error
    return port


def _last_error(log_path: Path, num_lines: int = 12) -> str:
    """Return the line of the log that names the root cause, then the log's end."""
    lines = log_path.read_text(errors="replace").splitlines()
    # vLLM prefixes "(EngineCore pid=1) ERROR 11-23 05:59:24 [core.py:7] "; warnings are no cause.
    bare = [re.sub(r"^\(\w+ pid=\d+\) (ERROR [^]]*\] )?", "", line) for line in lines]
    errors = [line for line in bare if re.match(r"([\w.]*(Error|Exception)|Killed)\b", line)]
    causes = [line for line in errors if "root cause" not in line] or errors
    return "\n  ".join([causes[0] if causes else "no error in its log", *bare[-num_lines:]])


def log_paths(log: Path, num_servers: int) -> list[Path]:
    """Return each server's log: `log` for one, `log` with their numbers for several."""
    if num_servers == 1:
        return [log]
    return [log.with_name(f"{log.stem}-{i}{log.suffix}") for i in range(num_servers)]


def cpu_threads(asked: int | None, num_servers: int) -> int:
    """Return how many CPU threads each server takes: `asked`, OMP_NUM_THREADS, or its share."""
    of_user = os.environ.get("OMP_NUM_THREADS", "").partition(",")[
        0
    ]  # a list counts for nested ones
    if asked is not None:
        return asked
    if of_user.isdecimal() and int(of_user) > 0:
        return int(of_user)
    return max(1, len(os.sched_getaffinity(0)) // num_servers)
