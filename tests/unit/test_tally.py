"""How far a generation is, told regularly where there is no terminal."""

from __future__ import annotations

import asyncio
import contextlib

from megafork.metrics.log import MetricsLog
from megafork.rollout import tally
from megafork.rollout.tally import Tally, tell_regularly


def test_a_tally_is_told_until_it_is_cancelled(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tally, "EVERY_S", 0.001)
    told = []

    async def generate(log):
        count = Tally(groups=4)
        second = asyncio.Event()

        def tell(text):
            told.append(text)
            log.progress(f"step    1  {text}")
            if len(told) == 2:
                second.set()

        telling = asyncio.create_task(tell_regularly(lambda: count, tell))
        count.add(300)
        count.add(10)
        await second.wait()
        telling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await telling
        return count

    with MetricsLog(tmp_path, 2, tensorboard=False) as log:
        count = asyncio.run(generate(log))
    assert (count.groups, count.done, count.tokens) == (4, 2, 310)
    assert all(text.startswith("2 of 4 groups, ") and "tokens/s" in text for text in told)
    assert "step    1  2 of 4 groups, " in capsys.readouterr().err


def test_tokens_per_second_are_of_the_time_since_the_start(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tally.time, "monotonic", lambda: now[0])
    count = Tally(groups=4, started=100.0)
    now[0] = 110.0
    count.add(315)
    assert str(count) == "1 of 4 groups, 32 tokens/s"
