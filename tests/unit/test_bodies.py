"""What a rollout server takes: one wrong type, and the request is refused before the engine."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafork.rollout.sampling import (
    ABORT_PATH,
    CONNECT_PATH,
    GENERATE_PATH,
    UPDATE_PATH,
    Sampling,
    TwoTemperatures,
)
from megafork.vllm_plugin.bodies import check_tokens, parsed_body

GENERATE = Sampling(
    temperature=0.7,
    max_tokens=9,
    stop_token_ids=(1,),
    forking_temperatures=TwoTemperatures(0.6, 1.0, 0.5),
).request_body([5, 6], 3, 17, request_id="a")
GOOD = {
    GENERATE_PATH: GENERATE,
    ABORT_PATH: {"request_ids": ["a", "b"]},
    CONNECT_PATH: {
        "senders": [
            {"host": "127.0.0.1", "port": 5000, "device": "cpu"},
            {"host": "127.0.0.1", "file": "/tmp/a/store", "device": "cuda"},
            {"socket": "megafork-1", "token": "secret"},
        ],
        "num_workers": 1,
        "first_worker": 0,
        "timeout_s": 300.0,
    },
    UPDATE_PATH: {
        "buckets": [{"sender": 0, "dtype": "bfloat16", "names": ["a"], "shapes": [[2, 3]]}]
    },
}
JUNK = [1.5, True, None, "1", [], {}, [1.5], -1, 2**70, math.nan, math.inf, [[1]], {"a": 1}]


def parsed(path, body):
    return parsed_body(path, json.dumps(body).encode())


def places(value, place=()):
    """Of every value in it, and of itself."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items if isinstance(value, (dict, list)) else ():
        yield from (
            places(inner, (*place, key)) if isinstance(inner, (dict, list)) else [(*place, key)]
        )


def replaced(value, place, new):
    if not place:
        return new
    changed = copy.deepcopy(value)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return changed


def same_kind(old, new):
    """Whether `new` is another value of the type that stands there, which may be right."""
    if isinstance(old, float) and type(new) in (int, float):
        return math.isfinite(new)
    return type(old) is type(new)


@pytest.mark.parametrize("path", GOOD)
def test_what_clients_send_is_taken_as_it_is(path):
    assert parsed(path, GOOD[path]) == GOOD[path]


@pytest.mark.parametrize("path", GOOD)
def test_a_value_of_another_type_is_refused_wherever_it_stands(path):
    optional = {("sampling_params", "seed"), ("sampling_params", "extra_args")}
    tried = 0
    for place in places(GOOD[path]):
        old = GOOD[path]
        for key in place:
            old = old[key]
        for junk in JUNK:
            if same_kind(old, junk) or (junk is None and place in optional):
                continue
            with pytest.raises(ValueError):
                parsed(path, replaced(GOOD[path], place, junk))
            tried += 1
    assert tried > 20


@pytest.mark.parametrize("path", GOOD)
def test_a_key_more_is_refused(path):
    for place in places(GOOD[path]):
        old = GOOD[path]
        for key in place:
            old = old[key]
        if isinstance(old, dict):
            with pytest.raises(ValueError):
                parsed(path, replaced(GOOD[path], place, old | {"unknown": 1}))


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("prompt_ids",), [1.5], "prompt_ids.0: Input should be a valid integer, not 1.5"),
        (("prompt_ids",), [], "prompt_ids: List should have at least 1 item"),
        (("prompt_ids",), [-1], "prompt_ids.0: .*greater than or equal to 0, not -1"),
        (("prompt_ids",), [2**31], "prompt_ids.0"),
        (("request_id",), "", "request_id"),
        (("sampling_params", "n"), 0, "sampling_params.n"),
        (("sampling_params", "n"), 10**9, "sampling_params.n"),
        (("sampling_params", "max_tokens"), 0, "sampling_params.max_tokens"),
        (("sampling_params", "temperature"), -0.1, "sampling_params.temperature"),
        (("sampling_params", "top_p"), 0.0, "sampling_params.top_p"),
        (("sampling_params", "seed"), 2**63, "sampling_params.seed"),
        (("sampling_params", "logprobs"), 1, "sampling_params.logprobs"),
        (("sampling_params", "detokenize"), True, "sampling_params.detokenize"),
    ],
)
def test_what_is_wrong_is_named(place, value, told):
    with pytest.raises(ValueError, match=told):
        parsed(GENERATE_PATH, replaced(GENERATE, place, value))


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"null", b'"x"', b"[" * 100_000])
def test_what_is_no_object_is_refused(content):
    with pytest.raises(ValueError):
        parsed_body(GENERATE_PATH, content)


def test_a_dtype_is_one_of_weights():
    bucket = GOOD[UPDATE_PATH]["buckets"][0]
    for dtype in ("int8", "load", "nn", "_C"):
        with pytest.raises(ValueError, match="dtype"):
            parsed(UPDATE_PATH, {"buckets": [bucket | {"dtype": dtype}]})


def test_a_token_of_another_model_is_refused():
    check_tokens([0, 9], 10)
    with pytest.raises(ValueError, match="prompt token 10 is not in the vocabulary of 10"):
        check_tokens([0, 10], 10)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(path=st.sampled_from(sorted(GOOD)), value=json_values, seed=st.randoms())
def test_whatever_comes_is_taken_or_refused(path, value, seed):
    """Anywhere in a good body: nothing but a ValueError, and what is taken holds its types."""
    place = seed.choice(list(places(GOOD[path])))
    try:
        taken = parsed(path, replaced(GOOD[path], place, value))
    except ValueError:
        return
    if path == GENERATE_PATH:
        assert all(type(token) is int for token in taken["prompt_ids"])
        assert math.isfinite(taken["sampling_params"]["temperature"])
