"""Seconds to train a reward head on 500 pairs for 1001 epochs, and how many times longer it takes
when the language model is run again for every batch: python benchmarks/reward_head.py [HEAD]

The model is that of model=tiny with random weights, on prompts and series of task=arithmetic; time
depends on neither. Prints one JSON line. Both kinds are timed in turn, the second for fewer epochs.
"""

import rlhf_exp.machine.environment  # noqa: F401, I001  first: it must precede the import of torch

import argparse
import json
import random
import time

import torch

from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.models.reward_model import HeadShape, RewardModel
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.stages.pair_data import FeaturePairs, pair_loss
from rlhf_exp.tasks.arithmetic import Arithmetic, series_reward
from rlhf_exp.tasks.pair_tokens import EncodedPair, encode_pairs
from rlhf_exp.tasks.protocol import Pair
from rlhf_exp.training.optim import AdamWSettings, clip_gradients
from rlhf_exp.machine.threads import threads_for

PAIRS, BATCH, EPOCHS, ROUNDS, SLOW_EPOCHS = 500, 100, 1001, 3, 20


def build(head: str) -> tuple[RewardModel, list[EncodedPair]]:
    """A frozen model with a fresh head, and pairs of an exact answer and one with an error."""
    task = Arithmetic()
    network, tokenizer = Scratch(tie_embeddings=False).language_model(task.build_tokenizer, seed=0)
    width, layers = (64, 1) if head == "last_token" else (192, 2)
    shape = HeadShape(kind=head, width=width, read_layers=layers, prepend_bos=False)
    model = RewardModel(CausalTransformer(network, tokenizer), shape)
    model.unfreeze(0)
    rng = random.Random(0)
    pairs = []
    for prompt, answer in rng.sample(task.demonstration_split().train, PAIRS):
        values = [int(word) for word in answer.split()]
        wrong = [*values]
        wrong[rng.randrange(len(wrong))] = rng.randrange(101)
        if wrong == values:
            wrong = [*values, values[-1]]
        reward = series_reward(values, wrong)
        text = "".join(f" {value}" for value in wrong)
        pairs.append(Pair(prompt, answer, text, 7.0, min(reward, 6.9)))
    sources = [""] * PAIRS
    return model, encode_pairs(tokenizer, pairs, sources, prepend_bos=False, limit=64)


def train(data: FeaturePairs, epochs: int) -> float:
    """Seconds of so many epochs, as the notebook trains: batches of 100 pairs, AdamW at 3e-4."""
    optimizer = AdamWSettings(head_lr=3e-4, eps=1e-8).build(data.model.backbone, data.model.head)
    assert data.rewards is not None
    chosen, rejected = data.rewards
    start = time.perf_counter()
    with threads_for(data.multiplications(BATCH)):
        for _ in range(epochs):
            for index in torch.randperm(PAIRS).split(BATCH):
                known = chosen[index], rejected[index]
                loss = pair_loss(data.scores(index), known, rank_coef=0.1)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                clip_gradients(optimizer, 1.0)
                optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Times both in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "head", nargs="?", default="last_token", choices=["last_token", "token_sum"]
    )
    head = parser.parse_args().head
    model, pairs = build(head)
    model.initialise_head(torch.Generator().manual_seed(0), bias=6.0)
    features, kept, anew = [], [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        data = FeaturePairs(model, pairs, keep_features=True, dtype="fp32")
        features.append(time.perf_counter() - start)
        kept.append(train(data, EPOCHS))
        slow = FeaturePairs(model, pairs, keep_features=False, dtype="fp32")
        anew.append(train(slow, SLOW_EPOCHS) / SLOW_EPOCHS * EPOCHS)
    seconds = sorted(f + k for f, k in zip(features, kept, strict=True))[ROUNDS // 2]
    print(
        json.dumps(
            {
                "head": head,
                "features_s": round(sorted(features)[ROUNDS // 2], 3),
                "features_and_1001_epochs_s": round(seconds, 2),
                "model_rerun_every_batch_s": round(sorted(anew)[ROUNDS // 2], 1),
                "ratio": round(sorted(anew)[ROUNDS // 2] / seconds, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
