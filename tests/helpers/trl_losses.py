"""What TRL's GRPOTrainer says: `python -m tests.helpers.trl_losses FOLDER` with TRL on the path.

Reads FOLDER/inputs.pt (model folder, table, old log-probabilities, masks, cases, log-probabilities
of the reference policy for those with a beta) and writes
FOLDER/losses.pt: the loss and the gradients of each case, in float64. See test_trl.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from megafork.config import MismatchConfig
from tests.helpers import reference
from tests.helpers.commands import QUICKSTART
from tests.helpers.objectives import corrected
from tests.helpers.step import MAX_RESPONSE_TOKENS, RHO


def padded(columns, side="right"):
    return pad_sequence(columns, batch_first=True, padding_side=side)


def importance_weights(table, old, correction):
    """[B, tokens] or, for whole sequences, [B, 1]."""
    log_ratios = [
        (old.double() - table.rollout_logprob_R.double())[table.rows(b)]
        for b in range(table.num_samples)
    ]
    mismatch, counts = MismatchConfig(**correction), {"truncated": 0, "masked": 0}
    if mismatch.level == "sequence":
        log_ratios = [log_ratio.sum()[None] for log_ratio in log_ratios]
    weights = [
        [corrected(ratio, mismatch, counts) for ratio in log_ratio.exp().tolist()]
        for log_ratio in log_ratios
    ]
    return padded([torch.tensor(w, dtype=torch.float64) for w in weights])


def make_inputs(table, old, correction, ref_logprobs):
    samples = range(table.num_samples)
    prompts, spans = [table.prompt(b) for b in samples], [table.rows(b) for b in samples]
    of_reference = {}
    if ref_logprobs is not None:
        of_reference["ref_per_token_logps"] = padded([ref_logprobs[span] for span in spans])
    return of_reference | {
        "prompt_ids": padded(prompts, "left"),
        "prompt_mask": padded([torch.ones_like(p) for p in prompts], "left"),
        "completion_ids": padded([table.token_R[span] for span in spans]),
        "completion_mask": padded([torch.ones_like(table.token_R[span]) for span in spans]),
        "old_per_token_logps": padded([old.double()[span] for span in spans]),
        "advantages": table.advantage_R[table.offsets[:-1]].double(),
        "num_items_in_batch": torch.tensor(table.num_rows),
        "importance_sampling_ratio": importance_weights(table, old, correction),
    }


def loss_and_gradients(model, folder, settings, inputs, mask, corrects):
    settings = dict(settings)
    beta = settings.pop("beta", 0.0)
    # A given fingerprint, because hashing a table fails with the dill that vLLM asks for.
    prompts = Dataset(InMemoryTable.from_pydict({"prompt": ["a"] * 8}), fingerprint="prompts")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda **_: [0.0],
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            max_completion_length=MAX_RESPONSE_TOKENS,
            **settings,
        ),
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(QUICKSTART / "model"),
    )
    trainer.beta = beta  # not in the settings: it would load a reference of its own
    trainer.use_vllm = corrects  # which turns the weights on
    trainer.top_entropy_quantile = RHO
    trainer.get_high_entropy_mask = lambda *_: mask
    model.eval()  # one batch is then the whole optimizer batch
    model.zero_grad()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def main(folder: Path) -> None:
    source, table, old, masks, cases, ref_logprobs = torch.load(
        folder / "inputs.pt", weights_only=False
    )
    model = reference.load_model(source, torch.float64)
    model.set_attn_implementation("sdpa")  # the eager one gives NaN for prompts padded on the left
    spans = [table.rows(b) for b in range(table.num_samples)]
    found = [
        loss_and_gradients(
            model,
            folder,
            settings,
            make_inputs(table, old, correction, ref_logprobs),
            padded([masks[select][span] for span in spans]),
            bool(correction),
        )
        for settings, select, correction in cases
    ]
    torch.save(found, folder / "losses.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
