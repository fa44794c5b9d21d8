"""Train a routing policy for a real LLM and show what it does:   python train.py

    1  calibrate   a_i of every block from 128 samples (Eq 6-7); mean and deviation of the scorer's input
    2  round       INT4 codes by GPTQ, block after block; cached beside the model and used again by the next run
    3  learn       what damage each (token, block, state) does, and a scorer that predicts it from the hidden state:
                   --objective fisher   labels from gradients of the full model (ours; the default)
                   --objective rl       the paper's policy gradient (Eq 11-17), started from static sensitivities
    4  price       the mu of `argmax q - mu cost` for every speedup between 1.2 and 4.5
    5  compare     on held-out text or items: full model, DASH, static, all INT8, random states

    --objective flexidepth | mindskip | gate-hidden | gate-fixed | gate-mlp   trains the gates of routers.py instead, with --skip blocks
    skipped a token; only steps 3 and 5, into router.safetensors.

`--data arc_easy` and the like learn on multiple-choice items: what is predicted is then the answer (data.Example), in labels,
rewards and comparison alike. `--train-model` goes on to train the base model through its rounded weights (Eq 17).

Fisher labels. Put a gate a = 0 on every (block, token, state): each product computes x W + a stop(x (W_s - W)), so that a = 1
would run that token's block in state s. Draw a target from the model's own distribution at every position; the label is half
the square of d log p(sequence) / d a, averaged over draws. That is the second-order estimate of the KL divergence which this
one choice adds over *all* later tokens, damage to keys and values included. In the words of the MDP it is -R_acc of Eq 13
summed over the whole episode, with every other decision at FP16: a value, where the paper samples returns.

Writes into --out: policy.safetensors (what infer.py and bench.py use), train.json (the table), train.jsonl (a line an epoch
or step), train.png, and checkpoint.safetensors, from which --resume goes on after a crash and gets to the same policy, bit for
bit; with --train-model also model.safetensors and its checkpoint, base.safetensors.
"""

import hashlib
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import routers
from baselines import Known, by_similarity, compare, comparison_table, observe, public, without
from common import (BEGAN, Checkpoint, Parser, canvas, command_line, descend, lock_folder, pick_device, save_figure, save_result,
                    write_safetensors, write_whole)
from data import Example, is_choice, kl, load_examples, load_text, outcomes, text_examples, windows
from model import load
from policy import (INDEX, INDEX_OF, POSITIONS, STATES, Fixed, Policy, Scorer, accuracy_reward, answer_reward, bit_costs, bucket, goal_cost,
                    latency_costs, lowest_price, mean_cost, most_speedup, plan, policy_gradient, random_states, returns, rewards,
                    static_plan, temperature, total_loss)
from quant import CLIPS, DAMPING, GROUP, dequantize_int4, gptq_int4, pack_nibbles
from weights import read_codes


SAMPLES, SAMPLE_TOKENS = 128, 64  # calibration of a_i
TARGETS = [1.2, 1.33, 1.5, 1.67, 1.8, 1.9, 2.0, 2.2, 2.4, 2.67, 2.9, 3.2, 3.5, 3.75, 4.0, 4.25, 4.5]  # speedups with a price
WINDOW, POOL = 256, 64  # tokens of a window, and windows, that INT4 rounding and the policy gradient see
LONG = 1024  # tokens of a window with Fisher labels
SKIP_SHARE = 0.1  # of a skip label: what every token has of its block's mean
BATCH, ROLLOUTS = 2, 4  # policy gradient: windows a step, rollouts of each
LR, ALPHA, LAM = 5e-4, 1.0, 0.0001


# ----------------------------------------------------------------------------------------------------------
# 1 Calibrate


@torch.no_grad()
def profile(model, tokens):
    """Every block's input x and output y over tokens (N, T): similarity and the two forms of a_i.

    Returns a dict of (L,) fp64 tensors: "similarity" mean cosine(x, y) (Eq 1-2), "least_squares" sum<x,y>/sum<x,x> and
    "norm_ratio" mean |y|/|x| (Eq 7), and (L, C): "mean", "std" of the RMS-normed x.
    """
    found = []
    for x, _, y in tqdm(model.block_by_block(tokens), desc="calibrate", total=len(model.blocks), leave=False):
        # ours: without the first token, whose norm is a thousand times the others' and would decide a_i alone
        x, y = (t.view(*tokens.shape, -1)[:, 1:].flatten(0, 1).double() for t in (x, y))
        normed = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        found.append({"similarity": F.cosine_similarity(x, y).mean(), "least_squares": (x * y).sum() / (x * x).sum(),
                      "norm_ratio": (y.norm(dim=1) / x.norm(dim=1)).mean(), "mean": normed.mean(0),
                      "std": normed.std(0, correction=0).clamp(min=1e-6)})
    return {key: torch.stack([f[key] for f in found]).cpu() for key in found[0]}


# ----------------------------------------------------------------------------------------------------------
# 2 Round: GPTQ


class Rounding:
    """Stands in for a layer's INT4 weight while its codes are chosen: the one call sees every calibration input at once,
    and what comes after it in the block sees outputs that are quantised already."""

    def __init__(self, linear, codes):
        self.linear, self.codes = linear, codes

    def __call__(self, x):
        self.codes = self.codes or gptq_int4(self.linear.weight, x.T @ x)
        return F.linear(x, dequantize_int4(*self.codes))


@torch.no_grad()
def choose_codes(model, tokens, codes, keep):
    """Fill codes {"BLOCK.LAYER": (codes, scale, zero)}, which may hold the first blocks already, from calibration tokens (n, T).

    Sequential: each block's inputs come from the quantised blocks before it; the first block, which always runs in FP16,
    passes on its FP16 output. `keep(codes)` is called every few blocks.
    """
    x, rope = model.embed(tokens).flatten(0, 1), model.rope(0, tokens.shape[1])
    for i, block in enumerate(tqdm(model.blocks, desc="round to INT4")):
        for name, linear in block.linears().items():
            linear.low["round"] = Rounding(linear, codes.get(f"{i}.{name}"))
        y = block(x, len(tokens), [("round", None)], 1.0, rope)
        for name, linear in block.linears().items():
            codes[f"{i}.{name}"] = linear.low.pop("round").codes
        x = y if i else block(x, len(tokens), [(4, None)], 1.0, rope)
        if i % 6 == 5:
            keep(codes)


def codes_name(tokens):
    """What INT4 codes chosen on these calibration tokens, by these settings, are called."""
    return "gptq-" + hashlib.sha256(tokens.cpu().numpy().tobytes() + repr((GROUP, DAMPING, CLIPS)).encode()).hexdigest()[:12]


def cache_codes(model, tokens):
    """Choose INT4 codes on calibration tokens (n, T) and cache them beside the model, unless they are there. A run that was killed
    goes on from the blocks that it had."""
    path = model.codes_file(codes_name(tokens))
    if path.exists():
        return

    def write(path, codes):
        tensors = {}
        for key, (code, scale, zero) in codes.items():
            tensors |= {key + ".codes": pack_nibbles(code), key + ".width": torch.tensor(code.shape[1]),
                        key + ".scale": scale.bfloat16(), key + ".zero": zero.bfloat16()}
        write_safetensors(path, tensors)

    some = path.with_suffix(".some")
    codes = read_codes(some, tokens.device) if some.exists() else {}
    choose_codes(model, tokens, codes, keep=lambda codes: write(some, codes))
    write(path, codes)
    some.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------
# 3a Static sensitivities


@torch.no_grad()
def sensitivities(model, examples, scale, states=(0, 1, 2)):
    """KL to the full model when one block alone runs in one state, in nats for each token that was run: (L, 4) over STATES.

    The first block is not decided, the last is not skipped: their entries stay 0 where nothing is to be measured.
    Every run starts at its block, from the full model's hidden states.
    """
    L, damage, tokens = len(model.blocks), torch.zeros(len(model.blocks), 4), sum(sum(e.lengths) for e in examples)
    for example in tqdm(examples, desc="sensitivity", leave=False):
        R, T = example.rows.shape
        inputs, rope = [x for x, _, _ in model.block_by_block(example.rows)], model.rope(0, T)

        def predict(i, state):  # block i alone in this state
            x = inputs[i]
            for j in range(i, L):
                x = model.blocks[j](x, R, [(state if j == i else 4, None)], scale[j], rope)
            return outcomes(model, model.norm(x).view(R, T, -1), example)[0]

        full = predict(L - 1, 4)
        for i in range(1, L):
            for s in [s for s in states if s or i < L - 1]:
                damage[i, INDEX_OF[s]] += float(kl(full, predict(i, s)).sum()) / tokens
    return damage


# ----------------------------------------------------------------------------------------------------------
# 3b Learn: Fisher labels, and a scorer that predicts them


class Gates(torch.autograd.Function):
    """y (n, N) unchanged, but with gates (3, n) = 0, one a token towards each change: y + sum gate * change. Their slopes are the dot
    products of dL/dy with the changes; a change of fewer columns is one of the last columns, None is none."""

    @staticmethod
    def forward(ctx, y, gates, *changes):
        ctx.changes = changes
        return y.view_as(y)

    @staticmethod
    def backward(ctx, slope):
        dots = [slope.new_zeros(len(slope)) if c is None else torch.linalg.vecdot(slope[:, -c.shape[1] :], c) for c in ctx.changes]
        return slope, torch.stack(dots), None, None, None


class Gated:
    """Stands in for a layer: x W^T with gates (3, n) towards its other states: skip, INT4, INT8."""

    def __init__(self, linear, gates, fill_from=None):
        self.linear, self.gates, self.fill_from = linear, gates, fill_from

    def __call__(self, x):
        y = F.linear(x, self.linear.weight)
        with torch.no_grad():
            int4, int8 = self.linear.low[1](x) - y, self.linear.low[2](x) - y
        # a skipped token's keys and values are in INT4
        return Gates.apply(y, self.gates, None if self.fill_from is None else int4[:, self.fill_from :], int4, int8)


def draws(model, hidden, example, generator):
    """Targets drawn from the model's own distribution, without end: yields d log p(targets) / d hidden, (N, C).

    Text: a token at every position, so the slope is the drawn row of the head minus the expected row, and more draws never
    touch the head again. Multiple choice: one answer.
    """
    if example.choices is None:
        with torch.no_grad():
            p = model.head(hidden).softmax(-1)
            expected, p = p @ model.head.weight, p.cumsum(-1)
        while True:  # through the distribution function: torch.multinomial takes ten times as long
            u = torch.rand(len(p), 1, generator=generator).to(p.device) * p[:, -1:]
            yield model.head.weight[torch.searchsorted(p, u)[:, 0].clamp(max=p.shape[1] - 1)] - expected
    logp = outcomes(model, hidden, example)[0][0]
    while True:
        pick = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator).item()
        yield torch.autograd.grad(logp[pick], hidden, retain_graph=True)[0]


def fisher_labels(model, example, scale, n_draws, generator, watch=None):
    """Half the squared derivative of log p(targets) by every gate, averaged over draws of the targets.

    Example with N tokens -> (N, L - 1, 3): blocks 2..L by skip, INT4, INT8; nats, each the harm done to all that the example
    predicts. `watch(i, x)` sees every block's input x (R, T, C).
    """
    R, T = example.rows.shape
    L, x, rope = len(model.blocks), model.embed(example.rows).flatten(0, 1), model.rope(0, T)
    gates = [torch.zeros(3, R * T, device=x.device, requires_grad=True) for _ in range(L)]
    for i, (block, gate) in enumerate(zip(model.blocks, gates)):
        if watch:
            watch(i, x.detach().view(R, T, -1))
        if i == 0:
            x = block(x, R, [(4, None)], 1.0, rope)
            continue
        for name, linear in block.linears().items():
            linear.low["gate"] = Gated(linear, gate, block.q_size if name == "qkv" else None)
        y = block(x, R, [("gate", None)], 1.0, rope)
        x = y if i == L - 1 else Gates.apply(y, gate, (scale[i] * x - y).detach(), None, None)
        for linear in block.linears().values():
            del linear.low["gate"]
    hidden = model.norm(x).view(R, T, -1)
    labels, source = 0.0, draws(model, hidden.detach().requires_grad_() if example.choices else hidden.detach()[0], example, generator)
    for _ in range(n_draws):
        slopes = torch.autograd.grad(hidden, gates[1:], next(source).view_as(hidden), retain_graph=True)
        labels = labels + torch.stack(slopes).square() / (2 * n_draws)
    return labels.permute(2, 0, 1)[example.keep().flatten()]


def gather_labels(model, examples, scorer, scale, horizon, seed, checkpoint, n_draws=1):
    """What the scorer learns from: labels (N, L - 1, 3), its inputs {block that plans: features (N, d + 2) bf16}, positions (N,).

    Saved every few examples; every example draws from its own generator, so a resumed run draws the same.
    """
    L, device = len(model.blocks), examples[0].rows.device
    plans = [i for i in range(L) if plan(i, L, horizon)]
    done = checkpoint.meta["step"]
    parts, saved = [checkpoint.tensors] if done else [], 0
    for n in tqdm(range(done, len(examples)), desc="fisher labels", initial=done, total=len(examples)):
        part, keep = {}, examples[n].keep()

        def watch(i, x):
            if i in plans:
                part[f"input.{i}"] = scorer.features(x, 0)[keep].detach().bfloat16()

        generator = torch.Generator().manual_seed(seed * 1000003 + n)
        part["labels"] = fisher_labels(model, examples[n], scale, n_draws, generator, watch)
        part["position"] = torch.arange(keep.shape[1], device=device).expand_as(keep)[keep]
        parts.append(part)
        saved += len(part["labels"])
        if saved >= 4096 or n + 1 == len(examples):
            parts, saved = [{k: torch.cat([p[k].to(device) for p in parts]) for k in part}], 0
            checkpoint.write(n + 1, parts[0])
    found = {k: t.to(device) for k, t in parts[0].items()}
    return found["labels"], {i: found[f"input.{i}"] for i in plans}, found["position"]


def fit(scorer, labels, inputs, horizon, seed, epochs=8, batch=64, lr=1e-3):
    """Fit log damage to labels (N, L - 1, 3) from inputs {block: (N, d + 2)}: the loss r + y exp(-r) is least where exp(r) is E[y].

    y: label over its block's mean, cut at 50; r: predicted log damage minus the block's log mean; weighted by the root of
    the block mean. The scorer starts at the means: its bias is set to their logarithm.
    """
    L, N = len(scorer.bias), len(labels)
    mean = labels.mean(0).clamp(min=1e-12)  # (L - 1, 3)
    y, weight = (labels / mean).clamp(max=50), mean.sqrt() / mean.sqrt().sum()
    weight[-1, 0] = 0.0  # the last block is never skipped
    with torch.no_grad():
        scorer.bias[1:, :, :3] = mean.log()[:, None]
    optimizer = torch.optim.AdamW(scorer.parameters(), lr)
    generator, steps = torch.Generator().manual_seed(seed), epochs * (N // batch or 1)
    torch.manual_seed(seed)  # dropout
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    scorer.train()
    log = []
    for epoch in tqdm(range(epochs), desc="fit", leave=False):
        losses = []
        for rows in torch.randperm(N, generator=generator).split(batch)[: N // batch or 1]:
            loss = 0.0
            for i, f in inputs.items():
                blocks = plan(i, L, horizon)
                these = slice(blocks[0] - 1, blocks[-1])
                r = scorer.log_damage(f[rows, None].float(), blocks)[:, 0, :, :, :3].mean(2) - mean[these].log()
                loss = loss + ((r + y[rows, these] * (-r).exp()) * weight[these]).sum((1, 2)).mean()
            descend(loss, optimizer, scorer.parameters())
            schedule.step()
            losses.append(loss.item())
        log.append({"epoch": epoch, "loss": sum(losses) / len(losses)})
    scorer.eval()
    return mean, log


# ----------------------------------------------------------------------------------------------------------
# 3c Learn: the paper's policy gradient


class Rollout(Policy):
    """A policy that samples (Eq 11) and keeps what the scorer saw, so that log pi can be computed with a gradient."""

    def decide(self, i, x, start):
        if plan(i, len(self.scale), self.horizon):
            self.seen[i] = self.scorer.features(x, start)
        super().decide(i, x, start)

    def log_pi(self):
        """log pi(s_i) of every decision of the last call, blocks 2..L: (L - 1, B, T), differentiable."""
        index, out = INDEX.to(self.states.device)[self.states.long()], []
        for i, features in self.seen.items():
            blocks = plan(i, len(self.scale), self.horizon)
            logp = (self.priced(self.scorer(features, blocks)) / self.tau).log_softmax(-1)
            before, chosen = (index[blocks[0] - k : blocks[-1] + 1 - k].permute(1, 2, 0)[..., None] for k in (1, 0))
            logp = logp.gather(3, before[..., None].expand(-1, -1, -1, 1, 4))[..., 0, :]  # (B, T, g, 4): the row of s
            out.append(logp.gather(3, chosen)[..., 0].permute(2, 0, 1))
        return torch.cat(out)


def leave_one_out(G):
    """The baseline b of Eq 16: the mean G of the other rollouts of the same example. G (L, rollouts, ...)."""
    return (G.sum(1, keepdim=True) - G) / (G.shape[1] - 1)


def reward_of(model, example, policy):
    """R_acc of Eq 13 for ROLLOUTS sampled runs of an example: (rollouts, tokens), and the states (L, rollouts, tokens) that made it.

    Text: log p_routed - log p_full of the token that follows; the last token has none. Multiple choice: +-1 for all tokens.
    """
    R, keep = len(example.rows), example.keep()
    with torch.no_grad():
        logp, right = outcomes(model, model.hidden(example.rows), example)
        hidden = model.hidden(example.rows.repeat(ROLLOUTS, 1), policy).unflatten(0, (ROLLOUTS, R))
        routed = torch.stack([outcomes(model, h, example)[0] for h in hidden])  # (rollouts, n, k)
    if example.choices is None:
        keep = keep & (torch.arange(keep.shape[1], device=keep.device) < keep.shape[1] - 1)
        r_acc = accuracy_reward(routed.gather(2, right.expand(ROLLOUTS, -1)[..., None])[..., 0], logp.gather(1, right[:, None])[:, 0])
    else:
        r_acc = answer_reward(routed[:, 0].argmax(-1) == right).to(keep.device)[:, None].expand(-1, int(keep.sum()))
    of_tokens = lambda t: t.unflatten(1, (ROLLOUTS, R))[:, :, keep]
    return r_acc, of_tokens(policy.states), of_tokens


def learn(policy, model, examples, beta, unit, steps, target_cost, checkpoint, log):
    """REINFORCE on examples; trains policy.scorer in place. Resumes from `checkpoint` when it has a step.

    unit: what a difference of 1 in q / tau is worth at the start, in nats, so that exploration has the scale of the damage.
    """
    generator = torch.Generator().manual_seed(checkpoint.seed)
    optimizer = torch.optim.Adam(policy.scorer.parameters(), LR)
    parameters = dict(policy.scorer.named_parameters())
    policy.mu, policy.generator = checkpoint.meta.get("mu", policy.mu), generator
    for step, bar in checkpoint.steps("policy gradient", steps, 5, parameters, optimizer, generator, lambda: {"mu": policy.mu}):
        policy.tau, losses, gained, costs = unit * temperature(step, steps), [], [], []
        optimizer.zero_grad()
        for n in torch.randperm(len(examples), generator=generator)[:BATCH].tolist():
            policy.seen = {}
            r_acc, states, of_tokens = reward_of(model, examples[n], policy)
            costed = STATES if policy.settings["cost"] == "bits" else policy.costs
            G = returns(rewards(states, r_acc, beta, costed, policy.settings["weights"]))[1:]
            advantage = G - leave_one_out(G)
            spread = advantage.flatten(1).std(dim=1)[:, None, None] + 1e-6  # ours: each block's advantages in units of their spread
            loss = total_loss(0.0, policy_gradient(of_tokens(policy.log_pi()), advantage / spread, 0.0), ALPHA) / BATCH
            loss.backward()
            losses.append(loss.item())
            gained.append(r_acc.mean().item())
            costs.append(mean_cost(states, policy.costs))
        optimizer.step()
        mean = lambda v: sum(v) / len(v)
        policy.mu += 0.5 * unit * (mean(costs) - target_cost)  # ours: the price holds the sampled cost at the target
        line = {"step": step, "r_acc": mean(gained), "cost": mean(costs), "mu": policy.mu, "tau": policy.tau, "loss": sum(losses)}
        log.write(json.dumps(line) + "\n")
        bar.set_postfix(r_acc=f"{line['r_acc']:+.4f}", cost=f"{line['cost']:.2f}")
    policy.tau = None


# ----------------------------------------------------------------------------------------------------------
# 4 Prices


class OpenLoop(Fixed):
    """The full model with a scorer looking on: `tables` gathers q of every decision, nothing is routed."""

    def __init__(self, policy):
        super().__init__([4] * len(policy.scale))
        self.policy, self.tables = policy, {}

    def decide(self, i, x, start):
        blocks = plan(i, len(self.scale), self.policy.horizon)
        if blocks:
            self.tables[blocks] = self.policy.scorer(self.policy.scorer.features(x, start), blocks)


@torch.no_grad()
def calibrate_prices(policy, model, examples, targets, goals):
    """The price for every target speedup: sets policy.prices to [(speedup, mu)]; goals are the mean costs wanted.

    With q of the full model's hidden states the cost at any mu is a look-up, so mu is found by bisection. That is exact where
    the whole path is planned after the first block, which runs in full. With a shorter horizon earlier states change what the
    scorer sees: then all targets run at once on a few short examples, and what that adds to the cost is taken off the goal.
    """
    L, device = len(policy.scale), examples[0].rows.device

    def look_at(examples):
        looks = []
        for example in tqdm(examples, desc="prices", leave=False):
            look = OpenLoop(policy)
            model.hidden(example.rows, look)
            looks.append({blocks: q[example.keep()][None] for blocks, q in look.tables.items()})
        return {blocks: torch.cat([look[blocks] for look in looks], 1) for blocks in looks[0]}

    def cost_at(mu, looks):
        policy.mu, states = mu, torch.full((L, 1, next(iter(looks.values())).shape[1]), 4, dtype=torch.uint8, device=device)
        for blocks, q in looks.items():
            states[blocks[0] : blocks[-1] + 1] = policy.choose(q, states[blocks[0] - 1])
        return mean_cost(states, policy.costs)

    price = lambda goal: lowest_price(lambda mu: cost_at(mu, looks), goal, -span, span)
    looks, steps = look_at(examples), policy.costs.sort().values.diff()
    gap = float(steps[steps > 1e-6].min())  # on a clock a skip can cost what INT4 does
    span = max(float(q.max() - q.masked_fill(q.isinf(), 0).min()) for q in looks.values()) / gap
    mus = [price(goal) for goal in goals]
    if policy.horizon < L:
        few = [Example(e.rows[:, :WINDOW], [min(n, WINDOW) for n in e.lengths]) for e in examples[:4]]
        few_looks, ran = look_at(few), [[] for _ in targets]
        for example in tqdm(few, desc="prices, closed loop", leave=False):
            R = len(example.rows)
            policy.mu = torch.tensor(mus).repeat_interleave(R).to(device)
            model.hidden(example.rows.repeat(len(targets), 1), policy)
            for n, states in enumerate(policy.states.split(R, dim=1)):
                ran[n].append(states[:, example.keep()])
        added = [mean_cost(torch.cat(states, 1), policy.costs) - cost_at(mu, few_looks) for states, mu in zip(ran, mus)]
        mus = [price(goal - more) for goal, more in zip(goals, added)]
    policy.prices, policy.mu = list(zip(targets, sorted(mus))), 0.0  # a higher speedup never has a lower price


# ----------------------------------------------------------------------------------------------------------
# --train-model: the base learns to bear its states (Eq 17)


class Straight:
    """Stands in for a layer's rounded weight while the base is trained: the weight plus its rounding error, held fixed, so that
    the gradient passes straight through the rounding (Bengio et al. 2013) to the weight."""

    def __init__(self, linear, low, rows=slice(None)):
        self.linear, self.rows, self.error = linear, rows, low.weight - linear.weight.detach()[rows]

    def __call__(self, x):
        return F.linear(x, self.linear.weight[self.rows] + self.error)


def train_base(model, policy, examples, steps, checkpoint, lr=1e-5):
    """Minimise CE of the routed model over its blocks' weights, the policy choosing states as at inference (Eq 17; PG taught the scorer
    before). Changes the model in place and takes its rounded weights away; call `quantize` again."""
    linears = {f"{i}.{name}": (linear, block.q_size) for i, block in enumerate(model.blocks) for name, linear in block.linears().items()}
    for linear, q_size in linears.values():
        linear.low = {s: Straight(linear, low, slice(q_size, None) if s == "fill" else slice(None)) for s, low in linear.low.items()}
    weights = {name: linear.weight.requires_grad_() for name, (linear, _) in linears.items()}
    optimizer, generator = torch.optim.AdamW(weights.values(), lr, weight_decay=0.0), torch.Generator().manual_seed(checkpoint.seed)
    for _, bar in checkpoint.steps("train the base", steps, 10, weights, optimizer, generator):
        example = examples[int(torch.randint(len(examples), (1,), generator=generator))]
        logp, right = outcomes(model, model.hidden(example.rows, policy), example)
        loss = total_loss(F.nll_loss(logp, right), 0.0, ALPHA)
        descend(loss, optimizer, weights.values())
        bar.set_postfix(ce=f"{loss.item():.3f}")
    for linear, _ in linears.values():
        linear.weight.requires_grad_(False).copy_(linear.weight.bfloat16())  # as it will be saved
        linear.low = {}
    model.quantized = False


def save_base(model, path):
    """The trained weights in bf16, with the name of the model that was there before any training: `--model out/model.safetensors` loads both."""
    tensors = {k: t.bfloat16() for k, t in model.state_dict().items() if not (model.config.tied and k == "head.weight")}
    write_safetensors(path, tensors, base=getattr(model, "base", model.name))


# ----------------------------------------------------------------------------------------------------------
# 5 Compare


SHADES = ((4, "full", "#1b4965"), (2, "INT8", "#5fa8d3"), (1, "INT4", "#bee9e8"), (0, "skip", "#e8e8e8"))  # of the states


def plot(path, log, states, names, rows):
    """Three panels: training, KL by method, states by block."""
    figure, (a, b, c) = canvas(15, 4, 3)
    x, y, label, title = (("epoch", "loss", "loss", "fit to Fisher labels") if "epoch" in log[0] else
                          ("step", "ce", "CE, nats a token", "cross-entropy of the gated model") if "ce" in log[0] else
                          ("step", "r_acc", "R_acc, nats a token", "reward of the sampled states"))
    a.plot([line[x] for line in log], [line[y] for line in log], marker="o" if x == "epoch" else None)
    a.set(xlabel=x, ylabel=label, title=f"Training: {title}")
    b.barh(names[1:], [r["kl"] for r in rows[1:]], color="tab:blue")
    b.invert_yaxis()
    b.set(xlabel="KL to the full model, nats", title="Held-out")
    b.locator_params(axis="x", nbins=5)
    bottom = torch.zeros(len(states))
    for s, label, color in SHADES:
        share = (states == s).float().mean(1)
        c.bar(range(1, len(states) + 1), share, bottom=bottom, label=label, color=color, width=1.0, edgecolor="white")
        bottom += share
    c.set(xlabel="block", ylabel="share of tokens", title=f"{names[1].split(' at ')[0]}, {rows[1]['speedup']:.2f}x", xlim=(0.5, len(states) + 0.5))
    c.legend(loc="lower right")
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------


def arguments():
    p = Parser(__doc__)
    p.add_argument("--data", default="pydocs", help="pydocs, wikitext2, cnn_dm, arc_easy, arc_challenge, mmlu, a text file, or a .jsonl of items")
    p.add_argument("--data-dir", help="folder with wikitext2/train.txt, arc_easy/train.jsonl and so on; without it they come from the hub")
    p.add_argument("--speedup", type=float, default=2.0, help="speedup to train for and show (any is served later)")
    p.add_argument("--cost", default="bits", choices=["bits", "latency"], help="what a speedup counts; latency needs bench.py speed")
    p.add_argument("--horizon", type=int, help="blocks decided from one hidden state: 1 is the paper, 0 each from its own input; default all at once")
    p.add_argument("--objective", default="fisher", choices=["fisher", "rl", *routers.KINDS],
                   help="fisher labels, the paper's policy gradient, or the gates of routers.py")
    p.add_argument("--skip", type=int, help="gates: how many of its blocks (mindskip: attentions) a token skips in the mean")
    p.add_argument("--samples", type=int, default=12, help="fisher: label this many times 1,024 tokens")
    p.add_argument("--steps", type=int, help="steps of the policy gradient (40) or of the gates (150)")
    p.add_argument("--train-model", action="store_true", help="then train the base model too, for --steps steps; writes model.safetensors")
    p.add_argument("--start", help="rl: a policy whose scorer to start from, instead of static sensitivities")
    p.add_argument("--lam", type=float, default=LAM, help="rl: weight of smoothness between the states of neighbouring blocks (Eq 8)")
    p.add_argument("--beta", type=float, help="rl: weight of the efficiency reward (Eq 12); default four times the static plan's price")
    p.add_argument("--no-weights", action="store_true", help="rl: w_i = 1 for every block (Eq 14 left out)")
    p.add_argument("--out", default="out", help="folder to write into")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return p.parse_args()


def up_to(tokens, examples):
    """The first examples that fill so many tokens."""
    sizes = torch.tensor([sum(e.lengths) for e in examples]).cumsum(0)
    return examples[: int((sizes < tokens).sum()) + 1]


def learn_from_labels(scorer, model, examples, few, scale, horizon, checkpoint, log_path):
    """3b: labels, fit. Returns the mean damage (L, 4) and the damage by position (11, L, 4): at t = 0, 1, 2-3, 4-7, ..."""
    labels, inputs, position = gather_labels(model, examples, scorer, scale, horizon, checkpoint.seed, checkpoint)
    # A skip is too large a change for a second-order estimate: hold its mean, block by block, to the measured KL. And where a token is all
    # but certain, or an answer unlikely, there is no slope, and yet a skip can do great damage: so every token's label has a share of that
    # mean. For items all of it.
    skip, share = sensitivities(model, few, scale, states=[0])[1:, 0].to(labels.device), 1.0 if few[0].choices else SKIP_SHARE
    labels[..., 0] = share * skip + (1 - share) * labels[..., 0] * skip / labels[..., 0].mean(0).clamp(min=1e-12)
    mean, log = fit(scorer, labels, inputs, horizon, checkpoint.seed)
    write_whole(log_path, "".join(json.dumps(line) + "\n" for line in log).encode())
    table = mean.repeat(POSITIONS, 1, 1)
    for p, t in enumerate(bucket(position, POSITIONS)[None] == torch.arange(POSITIONS, device=position.device)[:, None]):
        if t.any():
            table[p] = labels[t].mean(0)
    return F.pad(mean, (0, 1, 1, 0)).cpu(), F.pad(table, (0, 1, 1, 0)).cpu()


def learn_from_rewards(scorer, model, examples, few, scale, costs, horizon, args, checkpoint, log_path, settings):
    """3c: sensitivities or an earlier policy as the start, then the policy gradient. Returns the mean damage (L, 4)."""
    damage = sensitivities(model, few, scale)
    goal = goal_cost(args.speedup, len(scale), settings["overhead"])
    mu, _ = static_plan(damage, costs, goal)
    if args.start:
        before = Policy.load(args.start)
        before.check(model)
        if before.horizon != horizon or before.settings.get("cost") != args.cost:
            raise ValueError(f"--start {args.start}: its --horizon or --cost differs ({before.horizon}, {before.settings.get('cost')})")
        scorer.load_state_dict(before.scorer.state_dict())
        mu = before.at(args.speedup).mu
    else:
        scorer.bias.data[1:, :, :3] = damage[1:, None, :3].clamp(min=1e-12).log().to(scorer.bias.device)
    rollout = Rollout(scorer, scale, costs, settings["fingerprint"], horizon=horizon, settings=settings).to(scorer.bias.device)
    rollout.mu = mu
    unit = float((damage[1:, 1] - damage[1:, 2]).abs().median().clamp(min=1e-9))
    with start_log(log_path, checkpoint) as log:
        learn(rollout, model, examples, 4 * mu if args.beta is None else args.beta, unit, args.steps, goal, checkpoint, log)
    return damage


def start_log(path, checkpoint):
    """The log of a run without the lines that a killed run wrote after its checkpoint."""
    kept = path.read_text().splitlines()[: checkpoint.meta["step"]] if checkpoint.meta["step"] else []
    write_whole(path, "".join(line + "\n" for line in kept).encode())
    return open(path, "a", buffering=1)  # a line is out as soon as it is written


def report(out, names, rows, states, test, args, device, model, settings, how, wrote):
    """5: the comparison to the terminal, train.png and train.json."""
    choice = is_choice(args.data)
    markdown = comparison_table(names, rows, choice)
    print("\n" + markdown)
    log = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    plot(out / "train.png", log, states, names, rows)
    tokens, seconds = sum(sum(e.lengths) for e in test), round(time.time() - BEGAN)
    caption = f"Held-out {args.data}, {f'{len(test)} items, ' if choice else ''}{tokens} tokens, fp32, {how}; {seconds} s in all."
    save_result(out / "train.json", device, model, args.seed, caption=caption, markdown=markdown, tokens=tokens,
                settings=settings,
                rows=[{"name": name} | public(row) for name, row in zip(names, rows)])
    print(f"\n{caption}\nwrote {wrote}, train.json, train.jsonl and train.png into {out}")


def train_routers(args, device, text, model, tokenizer, read):
    """--objective flexidepth and the like: the gates of routers.py, at --skip skipped blocks a token."""
    c = model.config
    if c.n_layer < 4:
        raise ValueError(f"{args.model} has {c.n_layer} blocks; gates need a model of at least 4")
    policy = routers.Router(args.objective, c.n_layer, c.n_embd, c.n_hidden, model.fingerprint())
    if args.skip is None or not 0 < args.skip < len(policy.routed):
        raise ValueError(f"--objective {args.objective} needs --skip, 1 to {len(policy.routed) - 1} of this model's {c.n_layer} blocks")
    examples, test = read("train", 10**6, routers.WINDOW), read("test", 200 if is_choice(args.data) else 4, LONG)
    out = lock_folder(args.out)
    settings = {"model": args.model, "data": args.data, "objective": args.objective, "skip": args.skip, "steps": args.steps,
                "seed": args.seed, "fingerprint": policy.fingerprint}
    policy.settings = settings
    samples = windows(tokenizer, text, 8, min(WINDOW, c.block_size), args.data, spread=True).to(device)
    known = Known(c.n_layer, bit_costs(c), config=c, samples=samples)
    observe(known, model)
    routers.begin(policy.to(device), known, args.skip)
    checkpoint = Checkpoint(out / "checkpoint.safetensors", settings, args.seed, args.resume)
    with start_log(out / "train.jsonl", checkpoint) as log:
        routers.train_gates(policy, model, examples, args.skip, args.steps, checkpoint, log)
    routers.calibrate(policy, model, up_to(2 * LONG, read("train", 10**6 if is_choice(args.data) else 2, LONG)), args.skip)  # late tokens skip more
    policy.save(out / "router.safetensors")

    names = ["full model", args.objective, f"{args.skip} most similar blocks skipped"]
    rows = compare(model, test, [None, policy, without(known, by_similarity(known)[: args.skip])])
    report(out, names, rows, rows[1]["raw"][:: policy.rows], test, args, device, model, settings,
           f"objective {args.objective}, {args.skip} skips asked for", "router.safetensors")


def main():
    args = arguments()
    gates = args.objective in routers.KINDS
    args.steps = args.steps if args.steps is not None else 150 if gates else 40
    if gates and (args.train_model or args.cost != "bits" or args.horizon is not None):
        raise ValueError("--train-model, --cost and --horizon are for the scorer of --objective fisher or rl")
    if args.skip is not None and not gates:
        raise ValueError(f"--skip is for --objective {', '.join(routers.KINDS)}; give --speedup")
    if args.steps < 1 or args.samples < 1 or (args.horizon or 0) < 0:
        raise ValueError("--steps and --samples must be at least 1, --horizon at least 0")
    if args.objective != "rl" and (args.start or args.lam != LAM or args.beta is not None or args.no_weights):
        raise ValueError("--start, --lam, --beta and --no-weights are for --objective rl")
    if not all(math.isfinite(v) and v >= 0 for v in (args.lam, args.beta or 0.0)):
        raise ValueError("--lam and --beta must be 0 or more")
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    text = load_text(args.data, "train", args.data_dir)
    load_text(args.data, "test", args.data_dir)  # not there: say so before an hour's work
    model, tokenizer = load(args.model, device, torch.float32)
    bits, L, context = bit_costs(model.config), model.config.n_layer, model.config.block_size
    choice = is_choice(args.data)
    read = lambda split, n, size: load_examples(args.data, split, tokenizer, n, context if choice else min(size, context), args.data_dir,
                                                device, spread=True)
    if gates:
        train_routers(args, device, text, model, tokenizer, read)
        return
    horizon = L if args.horizon is None else min(args.horizon, L)
    costs, overhead = (bits, (0.0, 0.0)) if args.cost == "bits" else latency_costs(
        f"results/speed-{device.type}.json", device, model.fingerprint(), horizon)
    targets = [s for s in TARGETS if s <= most_speedup(L, costs, overhead)]
    if not targets:
        raise ValueError(f"{args.model} reaches {max(1.0, most_speedup(L, costs, overhead)):.2f}x at most with --cost {args.cost}, and policies "
                         f"are made for {TARGETS[0]}x and more; give a model of more blocks")
    if not targets[0] <= args.speedup <= targets[-1]:
        raise ValueError(f"--speedup {args.speedup:g} is out of reach: give {targets[0]} to {targets[-1]:.3g}")

    # What each step reads: samples for a_i, pool for INT4, examples to learn from, few for sensitivities, priced for prices; test is held out
    samples = windows(tokenizer, text, SAMPLES, min(SAMPLE_TOKENS, context), args.data, spread=True).to(device)
    pool = windows(tokenizer, text, POOL, min(WINDOW, context), args.data, spread=True).to(device)
    if args.objective == "fisher":
        examples = up_to(args.samples * LONG, read("train", 10**6 if choice else args.samples, LONG))
    else:
        examples = read("train", 10**6, WINDOW)[:: 1 if choice else 8][:POOL]
    priced = up_to(8 * LONG, read("train", 10**6 if choice else 8, LONG)) if choice else read("train", 8, LONG)
    few = priced[:8] if choice else text_examples(pool[len(pool) // 2][None])
    test = read("test", 200 if choice else 4, LONG)
    out = lock_folder(args.out)
    if args.train_model and Path(args.model).resolve() == (out / "model.safetensors").resolve():
        raise ValueError(f"--train-model would write over --model {args.model} itself; give another --out")
    settings = {"model": args.model, "data": args.data, "speedup": args.speedup, "objective": args.objective, "horizon": horizon,
                "steps": args.steps, "samples": args.samples, "seed": args.seed, "cost": args.cost, "costs": costs.tolist(),
                "overhead": list(overhead), "start": args.start, "lam": args.lam, "beta": args.beta, "weights": not args.no_weights,
                "int4": codes_name(pool), "fingerprint": model.fingerprint()}
    checkpoint = Checkpoint(out / "checkpoint.safetensors", settings, args.seed, args.resume)

    found = profile(model, samples)
    scale = found["norm_ratio"].tolist()  # measured better than least squares (bench.py ablation)
    cache_codes(model, pool)
    model.quantize(int4=settings["int4"])
    scorer = Scorer(L, model.config.n_embd, args.lam if args.objective == "rl" else 0.0).to(device)
    scorer.mean.copy_(found["mean"].mean(0))
    scorer.std.copy_(found["std"].square().mean(0).sqrt())
    log_path, tables = out / "train.jsonl", {}
    if args.objective == "fisher":
        damage, table = learn_from_labels(scorer, model, examples, few, scale, horizon, checkpoint, log_path)
        tables = {"position_damage": table.tolist()}  # what a plan by block and position goes by
    else:
        damage = learn_from_rewards(scorer, model, examples, few, scale, costs, horizon, args, checkpoint, log_path, settings)
    tables["damage"] = damage.tolist()  # what a static plan goes by

    policy = Policy(scorer, scale, costs, settings["fingerprint"], horizon=horizon, settings=settings | tables).to(device)
    calibrate_prices(policy, model, priced, targets, [goal_cost(s, L, overhead) for s in targets])
    before = []
    if args.train_model:
        before = compare(model, test, [None, policy.at(args.speedup)])
        base = Checkpoint(out / "base.safetensors", settings, args.seed, args.resume)
        train_base(model, policy.at(args.speedup), read("train", 10**6, LONG), args.steps, base)
        save_base(model, out / "model.safetensors")
        policy.fingerprint = settings["fingerprint"] = model.fingerprint()
        cache_codes(model, pool)
        model.quantize(int4=settings["int4"])
        calibrate_prices(policy, model, priced, targets, [goal_cost(s, L, overhead) for s in targets])
    policy.save(out / "policy.safetensors")

    # what DASH spent on the window at hand, which it ran just before them, is what the others may spend
    spent, generator = lambda: mean_cost(policy.states, costs), torch.Generator().manual_seed(args.seed)
    static = lambda rows: Fixed(static_plan(damage, costs, spent())[1], scale)
    equal = lambda rows: Fixed(random_states((L, *rows.shape), spent(), costs, generator), scale)
    int8 = Fixed([4] + [2] * (L - 1))
    names = ["full model", f"DASH at {args.speedup:g}x", "static, same cost", "random states, same cost", "all INT8"]
    rows = compare(model, test, [None, policy.at(args.speedup), static, equal, int8]) + before
    names += ["before training the base: full", f"before: DASH at {args.speedup:g}x"] if before else []
    report(out, names, rows, rows[1]["raw"], test, args, device, model, settings,
           f"INT4 by GPTQ, objective {args.objective} on {sum(sum(e.lengths) for e in examples)} tokens, horizon {horizon}", "policy.safetensors")


if __name__ == "__main__":
    command_line(main)
