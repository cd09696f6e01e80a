"""A controller's parts in this process, for tests of what the ranks do with one of them."""

from __future__ import annotations

import contextlib

from megafork.controller.handle import Controller
from megafork.controller.pushes import Pushes
from megafork.controller.ranks import Ranks
from megafork.data.sample import Group, Sample
from megafork.errors import UserError
from megafork.rollout.client import RolloutClient
from megafork.rollout.messages import Connection, serve
from tests.helpers.background import BackgroundLoop

KEY = "the run's key"


class OneServer(RolloutClient):
    """A client as the only one of a fleet."""

    async def members(self):
        return [(self.url, 0)]


@contextlib.contextmanager
def controller(mesh, answer, rows=None, loop=None):
    """The ranks' end of a controller that lives on rank 0 and answers so; collective.

    loop: that it runs on, if not one of its own.
    """
    with contextlib.ExitStack() as stack:

        def start():
            running = loop or stack.enter_context(BackgroundLoop())
            ranks = Ranks(mesh.world_size, 60.0, answer, rows, lambda name: None)

            async def talk(hello, link):
                await ranks.talk(hello["rank"], link)

            return running.submit(serve("127.0.0.1", KEY, talk, 1 << 20)).result()

        address = mesh.on_rank_zero(start)
        hello = {"role": "rank", "rank": mesh.rank}
        connection = stack.enter_context(Connection(address, KEY, hello, silence_s=60.0))
        yield Controller(mesh, connection)
        mesh.any_rank(False)  # rank 0 is there as long as others ask


class PushingTo:
    """Answers the questions of pushes to these servers; what fails is told, and not mended."""

    def __init__(self, client, *, in_flight=True, colocated=False, timeout_s=20.0):
        self.pushes = Pushes(
            client,
            workers_of_each=1,
            timeout_s=timeout_s,
            in_flight=in_flight,
            colocated=colocated,
        )
        self.version = 0

    async def __call__(self, question):
        said = await question.by_all()
        if question.kind == "push_begins":
            self.version = said[0]["version"]
            try:
                return await self.pushes.begins(), {}
            except UserError as error:
                raise failed(error) from error
        if question.kind == "join":
            try:
                return await self.pushes.joined([header["offer"] for header in said]), {}
            except UserError as error:
                raise failed(error) from error
        await self.pushes.ended(self.version, [header["failure"] for header in said])
        return {"kind": "done"}, {}


def failed(error):
    return UserError(f"the weight transfer to the rollout server failed: {error}")


async def probe(client, prompts, sampling):
    """One response to each prompt, as groups."""
    answers = [await client.generate(p.ids, 1, sampling) for p in prompts]
    return [
        Group(p.index, p.ids, 0, [Sample(i, c.token_ids, c.logprobs, c.truncated)])
        for i, (p, [c]) in enumerate(zip(prompts, answers, strict=True))
    ]
