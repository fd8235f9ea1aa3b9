"""Teaches a transformer to sort by reward alone, with jax_sce as its policy gradient.

    pip install -e ".[examples]"
    python examples/policy_gradient.py

The prompt is five digits. The model must write each digit that occurs once, in rising order, and
stop: `72527>257`. It never sees an answer. A program rewards what the model writes by the share of
right characters, and REINFORCE with a group baseline (GRPO's advantage) trains it: the model writes
several answers to each prompt, and each answer is reinforced by its reward minus the group's mean.

The fused head returns all that the update needs, without logits. Minus the loss is the
log-probability of each written token, at the `temperature` it was drawn at. `ignore_index` leaves
out the prompt and the tokens after the end. `aux.entropy`, differentiated exactly, is the bonus
that keeps the model exploring.

Time: about a minute on two CPU cores; `--quick` takes fewer steps, about 20 seconds.

Draws `policy_gradient.png`: reward and entropy by step. Ctrl-C keeps the curves so far.
"""

from __future__ import annotations

import common  # first, because of Ctrl-C

# isort: split
import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import train_language_model as language
from common import BLUE, VERMILION
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from jax_sce import linear_softmax_cross_entropy

DIGITS = 5  # in a prompt
SYMBOLS = "0123456789.>"
END, START = 10, 11  # the tokens that end the answer and that start it; a digit is its own token
PROMPTS, GROUP = 32, 16  # prompts in a step, and answers to each
TEMPERATURE = 0.8  # of the sampling, and therefore of the loss
ENTROPY_BONUS = 0.1  # with a smaller one, the model soon repeats its mistakes with certainty
IGNORED = -100  # the label of tokens that do not count
TESTS = 512  # prompts in the test

CONFIG = language.Config(vocabulary=len(SYMBOLS), width=64, depth=1, steps=400, learning_rate=2e-3)
QUICK = dataclasses.replace(CONFIG, steps=100)


# --- the task ------------------------------------------------------------------------------------
# B prompts of P = DIGITS + 1 tokens, answers of A = DIGITS + 1.


def prompts(key: Array, count: int) -> Array:  # [B, P]
    digits = jax.random.randint(key, (count, DIGITS), 0, 10)
    return jnp.pad(digits, ((0, 0), (0, 1)), constant_values=START)


def solve(prompt: Array) -> Array:
    """The right answers [B, A] to prompts [B, P], padded with END."""
    digits = jnp.arange(10)
    present = (prompt[:, :DIGITS, None] == digits).any(1)
    return jnp.sort(jnp.where(present, digits, END))[:, : DIGITS + 1]


def up_to_end(answer: Array) -> Array:
    """The mask of tokens [B, A] up to the first END, inclusive."""
    ends = answer == END
    return ends.cumsum(-1) - ends == 0


def reward(prompt: Array, answer: Array) -> Array:
    """The share of right characters, including END: [B]."""
    solution = solve(prompt)
    written, wanted = up_to_end(answer), up_to_end(solution)
    right = (answer == solution) & written & wanted
    return right.sum(-1) / (written | wanted).sum(-1)


# --- the policy ----------------------------------------------------------------------------------


@nnx.jit
def write(model: language.Transformer, prompt: Array, key: Array) -> Array:
    """Draws an answer [B, A] to each prompt [B, P]."""

    def add_token(length: Array, tokens: Array) -> Array:
        logits = model.logits(model.hidden(tokens)[:, length - 1])
        token = jax.random.categorical(jax.random.fold_in(key, length), logits / TEMPERATURE)
        return tokens.at[:, length].set(token)

    first, tokens = prompt.shape[1], jnp.pad(prompt, ((0, 0), (0, DIGITS + 1)))
    return jax.lax.fori_loop(first, tokens.shape[1], add_token, tokens)[:, first:]


def policy_loss(
    model: language.Transformer, prompt: Array, answer: Array, advantage: Array
) -> tuple[Array, Array]:
    """The loss whose gradient is the policy gradient, and the mean entropy of a token."""
    tokens = jnp.concatenate([prompt, answer], axis=1)
    labels = jnp.where(up_to_end(answer), answer, IGNORED)
    labels = jnp.pad(labels, ((0, 0), (prompt.shape[1] - 1, 0)), constant_values=IGNORED)
    loss, aux = linear_softmax_cross_entropy(
        model.hidden(tokens[:, :-1]),
        model.embedding.embedding[...].T,
        labels,
        ignore_index=IGNORED,
        temperature=TEMPERATURE,
        reduction="none",
        return_aux=True,
    )
    log_probability, count = -loss, (labels != IGNORED).sum()
    # Tokens that do not count have a log-probability and an entropy of 0.
    gain = advantage[:, None] * log_probability + ENTROPY_BONUS * aux.entropy
    return -gain.sum() / count, aux.entropy.sum() / count


class Measured(NamedTuple):
    """Measurements of the answers of one step, or of several with a leading axis."""

    reward: Array  # [], mean
    exact: Array  # [], the share of answers without a mistake
    entropy: Array  # [], mean over the tokens, in nats


@partial(nnx.jit, donate_argnames=("model", "optimizer"))
def train_step(model: language.Transformer, optimizer: nnx.Optimizer, key: Array) -> Measured:
    """One update from new answers to new prompts; measures the model before the update."""
    prompt_key, answer_key = jax.random.split(key)
    prompt = jnp.repeat(prompts(prompt_key, PROMPTS), GROUP, axis=0)
    answer = write(model, prompt, answer_key)
    rewards = reward(prompt, answer).reshape(PROMPTS, GROUP)
    advantage = rewards - rewards.mean(1, keepdims=True)
    advantage /= rewards.std(1, keepdims=True) + 1e-4  # 0 in a group of equal rewards
    gradient_fn = nnx.value_and_grad(policy_loss, has_aux=True)
    (_, entropy), gradient = gradient_fn(model, prompt, answer, advantage.ravel())
    optimizer.update(model, gradient)
    return Measured(rewards.mean(), (rewards == 1).mean(), entropy)


def train(
    model: language.Transformer,
    config: language.Config,
    key: Array,
    console: Console,
    history: list[Measured],
) -> None:
    """Trains the model and fills the history, which the caller has even after Ctrl-C."""
    with common.progress_bar(console) as progress:
        task = progress.add_task("compiling the training step", total=config.steps)
        optimizer = language.make_optimizer(model, config)
        for step_key in jax.random.split(key, config.steps):
            history.append(jax.device_get(train_step(model, optimizer, step_key)))
            mean = Measured(*np.mean(history[-20:], axis=0))
            description = f"reward {mean.reward:.3f}, entropy {mean.entropy:.3f}"
            progress.update(task, advance=1, description=description)


# --- the report ----------------------------------------------------------------------------------


def text(tokens: Array) -> str:
    return "".join(SYMBOLS[token] for token in tokens).partition(SYMBOLS[END])[0]


def show(prompt: Array, before: Array, after: Array) -> Table:
    """Prompts [B, P] and the answers [B, A] of the untrained and the trained model."""
    table = Table("prompt", "before", "after", "reward", "right answer", title="The model writes")
    rewards = reward(prompt, after)
    for *tokens, share, solution in zip(prompt, before, after, rewards, solve(prompt), strict=True):
        table.add_row(*map(text, tokens), f"{share:.2f}", text(solution))
    return table


def draw(path: Path, history: Measured) -> None:
    """Draws what was measured at each step, [steps], and its mean over 20 steps."""
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    rewards, entropy = figure.subplots(1, 2)
    window = min(20, len(history.reward))
    for axes, values, color, label in (
        (rewards, history.reward, BLUE, "reward"),
        (rewards, history.exact, VERMILION, "answers without a mistake"),
        (entropy, history.entropy, BLUE, "policy"),
    ):
        axes.plot(values, color=color, lw=0.8, alpha=0.35)
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        steps = np.arange(len(mean)) + (window - 1) / 2
        axes.plot(steps, mean, color=color, lw=2, label=label)
    uniform = np.log(len(SYMBOLS))
    entropy.axhline(uniform, color="0.4", linestyle="--", label=f"uniform: log {len(SYMBOLS)}")
    rewards.set(title="Reward", xlabel="step", ylabel="mean over the answers", ylim=(0, 1.02))
    entropy.set(title="Entropy", xlabel="step", ylabel="nats per token")
    entropy.set_ylim(bottom=0)
    for axes in (rewards, entropy):
        axes.legend(loc="best")
        common.tidy(axes)
    figure.suptitle(f"Sorting {DIGITS} digits, learned by reward alone")
    figure.savefig(path)


def main() -> None:
    parser = common.make_parser(__doc__, f"{QUICK.steps} steps, not {CONFIG.steps}")
    parser.add_argument(
        "--seed", type=common.seed, default=0, help="seed of the model and the prompts (default: 0)"
    )
    args = parser.parse_args()
    path = common.picture(parser, args, "policy_gradient", "quick", "seed")

    config = QUICK if args.quick else CONFIG
    console, began = Console(), time.perf_counter()
    training_key, test_key, answer_key = jax.random.split(jax.random.key(args.seed), 3)
    with console.status("Making the model, and compiling how it writes"):
        model = language.Transformer(config, nnx.Rngs(args.seed))
        test = prompts(test_key, TESTS)
        before = write(model, test, answer_key)
    steps: list[Measured] = []
    try:
        train(model, config, training_key, console, steps)
    except KeyboardInterrupt:
        if not steps:
            raise
        path = common.of_stopped(path)
        draw(path, Measured(*np.array(steps).T))
        kept = f"Stopped after {len(steps)} of {config.steps} steps. The curves so far: {path}"
        raise KeyboardInterrupt(kept) from None
    history = Measured(*np.array(steps).T)
    after = write(model, test, answer_key)

    draw(path, history)
    console.print(show(test[:6], before[:6], after[:6]))
    old, new = reward(test, before), reward(test, after)
    language.show_figures({
        "steps": f"{config.steps:,}, each {PROMPTS} prompts with {GROUP} answers",
        "seconds": f"{time.perf_counter() - began:.1f}",
        "reward in training": f"{history.reward[:20].mean():.3f} -> {history.reward[-20:].mean():.3f}",
        "entropy of a token": f"{history.entropy[0]:.3f} -> {history.entropy[-20:].mean():.3f}",
        "reward in the test": f"{old.mean():.3f} -> {new.mean():.3f}",
        "without a mistake": f"{(old == 1).mean():.1%} -> {(new == 1).mean():.1%}",
        "curves": str(path),
    })  # fmt: skip
    if new.mean() < 2 * old.mean():
        raise SystemExit("The reward did not double.")


if __name__ == "__main__":
    main()
