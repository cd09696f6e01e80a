"""How the vLLM server starts, ends and fails, and what its client makes of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megafork.data.sample import Sample
from megafork.errors import UserError
from megafork.parallel.ports import free_port
from megafork.rollout import client as client_module
from megafork.rollout.client import RolloutClient, ServerError, ServerLost
from megafork.rollout.sampling import (
    Sampling,
    decode_samples,
    encode_samples,
)
from megafork.rollout.supervisor import FOLDER, GRACE_S
from megafork.rollout.vllm_server import VllmServer
from tests.helpers.blocking import Blocking
from tests.helpers.commands import ROOT, gone_within, members, tiny_engine
from tests.helpers.reference import save_model

# ------------------------------------------------------------------- start, end, errors


def unstarted(folder: Path, tmp_path: Path, **options) -> VllmServer:
    defaults = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8}
    return VllmServer(folder, log_path=tmp_path / "logs" / "vllm.log", **(defaults | options))


def test_a_folder_that_is_no_model_is_named_at_once(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config\.json does not exist"):
        unstarted(tmp_path / "nowhere", tmp_path).start()
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        unstarted(tmp_path, tmp_path).start()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="names no architectures"):
        unstarted(tmp_path, tmp_path).start()


def test_a_taken_port_is_named_at_once(tmp_path):
    folder = save_model(tmp_path / "model", tied=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port} \(Address already in use\)"):
            unstarted(folder, tmp_path, port=port).start()


@pytest.mark.slow
def test_vllm_says_what_it_fails_of(tmp_path):
    folder = save_model(tmp_path / "model", tied=True)
    server = unstarted(folder, tmp_path, max_model_len=100_000)
    with pytest.raises(UserError, match=r"max_model_len.*100000(.|\n)*full log: .*vllm\.log"):
        server.start()
    assert gone_within(server.process_group, 1)


def test_a_server_that_fails_says_why_and_leaves_nothing(tmp_path):
    """It has started another process by then, which would go on."""
    folder = save_model(tmp_path / "model", tied=True)
    failing = tmp_path / "python"
    failing.write_text(
        "#!/bin/sh\nsleep 300 &\necho starting\necho 'ValueError: no room' >&2\nexit 1\n"
    )
    failing.chmod(0o755)
    server = unstarted(folder, tmp_path, python=str(failing))
    with pytest.raises(UserError, match=r"ValueError: no room(.|\n)*full log: .*vllm\.log"):
        server.start()
    assert gone_within(server.process_group, 1)


def test_a_server_that_is_too_slow_is_ended(tmp_path):
    folder = save_model(tmp_path / "model", tied=True)
    server = unstarted(folder, tmp_path, startup_timeout_s=0.5)
    with pytest.raises(UserError, match=r"startup_timeout_s=0\.5"):
        server.start()
    assert gone_within(server.process_group, 1)


def test_stop_from_another_thread_ends_a_start(tmp_path):
    folder = save_model(tmp_path / "model", tied=True)
    server = unstarted(folder, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(server.start)
        while server.process_group is None:
            time.sleep(0.01)
        server.stop()
        with pytest.raises(UserError, match="did not start"):
            starting.result()
    assert gone_within(server.process_group, 1)
    server.stop()
    with pytest.raises(UserError, match="make a new one"):
        server.start()


def test_kill_9_of_the_trainer_leaves_no_process(tmp_path):
    """Although a worker forked off the trainer keeps the supervisor's pipe open. That vLLM's own
    processes end too is seen in tests/runs/test_resume.py."""
    folder = save_model(tmp_path / "model", tied=True)
    program = (
        "import os, sys, time\n"
        "from tests.servers.test_server_lifecycle import Path, unstarted\n"
        "server = unstarted(Path(sys.argv[1]), Path(sys.argv[2]), python=sys.argv[3])\n"
        "server.start()\n"
        "forked = os.fork()\n"
        "if forked: print(server.process_group, forked, flush=True)\n"
        "time.sleep(600)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(tmp_path), str(tiny_engine(tmp_path))],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    process_group, forked = map(int, trainer.stdout.readline().split())
    try:
        assert len(members(process_group)) >= 2  # supervisor and server
        trainer.kill()
        trainer.wait()
        assert gone_within(process_group, 15)
    finally:
        os.kill(forked, signal.SIGKILL)
        trainer.kill()
        trainer.stdout.close()


def start_supervisor(script: str, stdout: int, grace_s: float = GRACE_S) -> subprocess.Popen:
    program = (
        "import sys; from megafork.rollout import supervisor; supervisor.GRACE_S = "
        f"{grace_s}; supervisor.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "bash", "-c", script]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=stdout, cwd=ROOT, start_new_session=True
    )


@pytest.mark.parametrize("how", ["pipe", "signal"])
def test_the_supervisor_kills_what_ignores_term(how, tmp_path, monkeypatch):
    """And leaves nothing of the server's folder, whoever made it."""
    folder, kept = tmp_path / "server", tmp_path / "kept"
    folder.mkdir()
    kept.mkdir()
    (folder / "socket").touch()
    (folder / "megafork").symlink_to(kept)
    monkeypatch.setenv(FOLDER, str(folder))
    script = "trap '' TERM; sleep 300 & sleep 300"
    supervisor = start_supervisor(script, subprocess.DEVNULL, grace_s=0.5)
    while len(members(supervisor.pid)) < 4:
        assert supervisor.poll() is None
        time.sleep(0.02)
    if how == "pipe":
        supervisor.stdin.close()
    else:
        supervisor.terminate()
    assert gone_within(supervisor.pid, 10)
    supervisor.wait()
    assert list(tmp_path.iterdir()) == [kept]


def test_the_engines_own_world_listens_on_loopback_alone():
    """As torch makes it for a server with several workers."""
    program = (
        "import megafork.vllm_plugin.serve, psutil, sys, torch.distributed as dist\n"
        "address = 'tcp://127.0.0.1:' + sys.argv[1]\n"
        "dist.init_process_group('gloo', init_method=address, rank=0, world_size=1)\n"
        "sockets = psutil.Process().net_connections('inet')\n"
        "print(sorted(s.laddr for s in sockets if s.status == psutil.CONN_LISTEN))"
    )
    port = free_port()
    done = subprocess.run(
        [sys.executable, "-c", program, str(port)],
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"ip='(.*?)', port=(\d+)", done.stdout)
    assert {host for host, _ in found} == {"127.0.0.1"}, done.stderr
    assert str(port) in {port for _, port in found}


def test_the_supervisor_sweeps_up_after_a_server_that_exits():
    """An API server that crashes leaves its engine processes; its output goes to the log."""
    supervisor = start_supervisor("sleep 300 & echo started; exit 3", stdout=subprocess.PIPE)
    with supervisor.stdout as log:  # its end is the end of everyone who could write to it
        lines = log.read().decode().splitlines()
    assert lines[0] == "started"
    assert re.search(r"exited with status 3; its largest process had \d+\.\d GiB", lines[1])
    assert gone_within(supervisor.pid, 1)
    supervisor.stdin.close()
    supervisor.wait()


def test_the_supervisor_names_the_memory_of_a_server_that_was_killed():
    """As by the kernel, where memory runs out: here with 200 MiB in the engine of an API server."""
    engine = "import os, signal; b = bytes([1]) * (200 << 20); os.kill(os.getpid(), signal.SIGKILL)"
    script = f"{sys.executable} -c '{engine}'; kill -9 $$"
    supervisor = start_supervisor(script, stdout=subprocess.PIPE)
    with supervisor.stdout as log:
        told = log.read().decode()
    found = re.search(r"was killed by signal 9; its largest process had (\d+\.\d) GiB", told)
    assert found is not None, told
    assert 0.2 <= float(found[1]) < 1
    supervisor.stdin.close()
    supervisor.wait()


# ------------------------------------------------------------------------------ client


def test_a_server_that_is_gone_is_named_with_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "_ATTEMPTS", 2)
    log = tmp_path / "vllm.log"
    log.write_text("\n".join(["early", *["filler"] * 20, "RuntimeError: out of memory"]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = Blocking(RolloutClient(url, "key", log_path=log))
    for attempt in (lambda: client.generate([1], 1, Sampling()), client.resume):
        with pytest.raises(UserError) as error:
            attempt()
        assert url in str(error.value) and "out of memory" in str(error.value)
        assert "early" not in str(error.value)
    assert not client.health()


def test_a_server_that_says_nothing_is_named_with_the_time(monkeypatch):
    monkeypatch.setattr(client_module, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        client = Blocking(RolloutClient(f"http://127.0.0.1:{port}", "key"))
        with pytest.raises(ServerLost, match=rf":{port} does not answer .*: nothing within 0\.2 s"):
            client.weight_version()


@contextlib.contextmanager
def answering(body: bytes, *, after_hanging_up: int = 0):
    """A client of a server that gives this answer once, after it has hung up so often."""
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    def serve(listener: socket.socket) -> None:
        for _ in range(after_hanging_up):
            listener.accept()[0].close()
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(reply)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield Blocking(RolloutClient(f"http://127.0.0.1:{listener.getsockname()[1]}", "key"))
        thread.join()


@pytest.mark.parametrize("page", ["[]", '{"weight_version": "new"}', "{}", "<html>", ""])
@pytest.mark.parametrize(
    ("ask", "path"),
    [
        (lambda client: client.weight_version(), "/weight_info"),
        (lambda client: client.model_path(), "/v1/models"),
        (lambda client: client.wake_up("kv_cache"), r"/wake_up\?tags=kv_cache"),
        (lambda client: client.reset_prefix_cache(), r"/reset_prefix_cache\?.*"),
        (lambda client: client.start_weight_update(), "/is_paused"),
    ],
    ids=["version", "model", "wake", "reset", "paused"],
)
def test_another_programs_answer_is_refused(ask, path, page):
    refused = pytest.raises(ServerError, match=rf"^{path} failed with HTTP 200: ")
    with answering(page.encode()) as client, refused:
        ask(client)


def plain(completions):
    """Each one's tokens, log-probabilities (as text: -0.0 is not 0.0) and end."""
    return [
        (list(map(int, c.token_ids)), [str(float(x)) for x in c.logprobs], c.finish_reason)
        for c in completions
    ]


def test_a_dropped_connection_is_tried_again():
    expected = [Sample.from_server([3, 1], [-0.5, -0.25], "stop")]
    with answering(encode_samples(expected), after_hanging_up=1) as client:
        assert plain(client.generate([1], 1, Sampling())) == plain(expected)


def test_completions_survive_the_wire():
    completions = [
        Sample.from_server([2**31 - 1, 0], [-0.0, -1.5], "length"),
        Sample.from_server([], [], "abort"),
        Sample.from_server([7], [float("-inf")], "stop"),
    ]
    payload = encode_samples(completions)
    decoded = decode_samples(payload)
    assert plain(decoded) == [
        ([2**31 - 1, 0], ["-0.0", "-1.5"], "length"),
        ([], [], "abort"),
        ([7], ["-inf"], "stop"),
    ]
    assert all(c.token_ids.dtype == np.int32 for c in decoded)
    assert all(c.logprobs.dtype == np.float32 for c in decoded)
    assert decode_samples(encode_samples([])) == []
    with pytest.raises(ValueError, match="bytes for 3 tokens"):
        decode_samples(payload[:-1])


def test_a_request_states_every_parameter():
    sampling = Sampling(temperature=0.7, max_tokens=9, stop_token_ids=(1, 4))
    body = sampling.request_body([5], 3, 17, request_id="prompt-7")
    params = body["sampling_params"]
    assert (body["prompt_ids"], body["request_id"]) == ([5], "prompt-7")
    assert params == {
        "n": 3, "seed": 17, "temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
        "max_tokens": 9, "min_tokens": 0, "ignore_eos": True, "stop_token_ids": [1, 4],
        "logprobs": 0, "detokenize": False,
    }  # fmt: skip


def test_the_servers_modules_need_no_megatron():
    """They may run under the Python of an environment that has vLLM alone."""
    program = (
        "import sys, unittest.mock\n"
        "for name in ('', '.config', '.exceptions', '.inputs', '.platforms', '.sampling_params',\n"
        "             '.model_executor.model_loader.reload'):\n"
        "    sys.modules['vllm' + name] = unittest.mock.MagicMock()  # 15 s to import\n"
        "import megafork.vllm_plugin.routes\n"
        "print([m for m in sys.modules if m.startswith(('megatron', 'transformer_engine'))])\n"
        "print(sorted(m for m in sys.modules if m.startswith('megafork.')))"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.splitlines()[-2] == "[]", out.stderr
    assert "megafork.config" not in out.stdout
