"""Train a routing policy for a real LLM and show what it does:   python train.py

    1  calibrate   a_i of every block from 128 samples (Eq 6-7); mean and deviation of the scorer's input
    2  round       INT4 codes by GPTQ, block after block; cached beside the model and used again by the next run
    3  learn       what damage each (token, block, state) does, and a scorer that predicts it from the hidden state:
                   --objective fisher   labels from gradients of the full model (ours; the default)
                   --objective rl       the paper's policy gradient (Eq 11-17), started from static sensitivities
    4  price       the mu of `argmax q - mu cost` for every speedup between 1.2 and 4, closed loop
    5  compare     on held-out text: full model, DASH, static, all INT8, random states

Fisher labels. Put a gate a = 0 on every (block, token, state): each product computes x W + a stop(x (W_s - W)), so that a = 1
would run that token's block in state s. Draw a target from the model's own distribution at every position; the label is half
the square of d log p(sequence) / d a, averaged over draws. That is the second-order estimate of the KL divergence which this
one choice adds over *all* later tokens, damage to keys and values included. In the words of the MDP it is -R_acc of Eq 13
summed over the whole episode, with every other decision at FP16: a value, where the paper samples returns.

Writes into --out: policy.safetensors (what infer.py and bench.py use), train.json (the table), train.jsonl (a line a
step), train.png, and checkpoint.safetensors, from which --resume goes on after a crash and gets to the same policy, bit for
bit.
"""

import hashlib
import io
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save
from tqdm import tqdm

from data import load_text, windows
from model import load
from policy import (INDEX, INDEX_OF, STATES, Fixed, Parser, Policy, Scorer, accuracy_reward, bit_costs, command_line, goal_cost,
                    latency_costs, mean_cost, most_speedup, pick_device, plan, policy_gradient, random_states,
                    read_safetensors, returns, rewards, save_result, speedup_bits, state_shares, static_plan, temperature,
                    total_loss, write_whole)
from quant import dequantize_int4, gptq_int4, pack_nibbles

SAMPLES, SAMPLE_TOKENS = 128, 64  # calibration of a_i
TARGETS = [1.2, 1.33, 1.5, 1.67, 1.8, 1.9, 2.0, 2.2, 2.4, 2.67, 2.9, 3.2, 3.5, 3.75, 4.0]  # speedups with a price
WINDOW, POOL = 256, 64  # tokens of a window, and windows, that INT4 rounding and the policy gradient see
LONG = 1024  # tokens of a window with Fisher labels
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
    sums = [dict.fromkeys(("n", "cos", "xy", "xx", "ratio", "x", "x2"), 0.0) for _ in model.blocks]

    def watch(i):
        def hook(block, args, y):
            # ours: without the first token, whose norm is a thousand times the others' and would decide a_i alone
            x, y = (t.view(args[1], -1, t.shape[-1])[:, 1:].flatten(0, 1).double() for t in (args[0], y))
            s = sums[i]
            normed = F.rms_norm(x, x.shape[-1:], eps=1e-6)
            new = {"n": len(x), "cos": F.cosine_similarity(x, y).sum(), "xy": (x * y).sum(), "xx": (x * x).sum(),
                   "ratio": (y.norm(dim=1) / x.norm(dim=1)).sum(), "x": normed.sum(0), "x2": normed.square().sum(0)}
            for key, value in new.items():
                s[key] = s[key] + value
        return hook

    hooks = [block.register_forward_hook(watch(i)) for i, block in enumerate(model.blocks)]
    try:
        for rows in tqdm(tokens.split(8), desc="calibrate", leave=False):
            model.hidden(rows)
    finally:
        for hook in hooks:
            hook.remove()
    stack = lambda f: torch.stack([torch.as_tensor(f(s)) for s in sums]).cpu()
    mean = stack(lambda s: s["x"] / s["n"])
    return {"similarity": stack(lambda s: s["cos"] / s["n"]), "least_squares": stack(lambda s: s["xy"] / s["xx"]),
            "norm_ratio": stack(lambda s: s["ratio"] / s["n"]), "mean": mean,
            "std": (stack(lambda s: s["x2"] / s["n"]) - mean.square()).clamp(min=1e-12).sqrt()}


# ----------------------------------------------------------------------------------------------------------
# 2 Round: GPTQ


class Rounding:
    """Stands in for a layer's INT4 weight while its codes are chosen: the one call sees every calibration input at once,
    and what comes after it in the block sees outputs that are quantised already."""

    def __init__(self, linear):
        self.linear = linear

    def __call__(self, x):
        self.codes = gptq_int4(self.linear.weight, x.T @ x)
        return F.linear(x, dequantize_int4(*self.codes))


@torch.no_grad()
def choose_codes(model, tokens):
    """INT4 codes of every layer from calibration tokens (n, T): {"BLOCK.LAYER": (codes, scale, zero)}.

    Sequential: each block's inputs come from the quantised blocks before it; the first block, which always runs in FP16,
    passes on its FP16 output.
    """
    x, rope, codes = model.embed(tokens).flatten(0, 1), model.rope(0, tokens.shape[1]), {}
    for i, block in enumerate(tqdm(model.blocks, desc="round to INT4")):
        for linear in block.linears().values():
            linear.low["round"] = Rounding(linear)
        y = block(x, len(tokens), [("round", None)], 1.0, rope)
        for name, linear in block.linears().items():
            codes[f"{i}.{name}"] = linear.low.pop("round").codes
        x = y if i else block(x, len(tokens), [(4, None)], 1.0, rope)
    return codes


def codes_name(tokens):
    """What INT4 codes chosen on these calibration tokens are called."""
    return "gptq-" + hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:12]


def cache_codes(model, tokens):
    """Choose INT4 codes on calibration tokens (n, T) and cache them beside the model, unless they are there."""
    path = model.codes_file(codes_name(tokens))
    if path.exists():
        return
    tensors = {}
    for key, (codes, scale, zero) in choose_codes(model, tokens).items():
        tensors |= {key + ".codes": pack_nibbles(codes), key + ".width": torch.tensor(codes.shape[1]),
                    key + ".scale": scale.bfloat16(), key + ".zero": zero.bfloat16()}
    write_whole(path, save({k: t.cpu().contiguous() for k, t in tensors.items()}))


# ----------------------------------------------------------------------------------------------------------
# 3a Static sensitivities


@torch.no_grad()
def log_probs(model, tokens, policy=None):
    """(B, T) -> log-probabilities of the next token (B, T, vocab) fp32."""
    return model(tokens, policy).float().log_softmax(-1)


def kl(full, routed):
    """KL(full || routed) in nats from log-probabilities (..., vocab) -> (...)."""
    return (full.exp() * (full - routed)).sum(-1)


@torch.no_grad()
def sensitivities(model, tokens, scale, states=(0, 1, 2)):
    """KL to the full model, in nats a token, when one block alone runs in one state: (L, 4) over STATES.

    The first block is not decided, the last is not skipped: their entries stay 0 where nothing is to be measured.
    Every run starts at its block, from the full model's hidden states.
    """
    L, damage = len(model.blocks), torch.zeros(len(model.blocks), 4)
    inputs, rope = [], model.rope(0, tokens.shape[1])
    x, B = model.embed(tokens).flatten(0, 1), len(tokens)
    for block in model.blocks:
        inputs.append(x)
        x = block(x, B, [(4, None)], 1.0, rope)
    full = model.head(model.norm(x)).float().log_softmax(-1)
    for i in tqdm(range(1, L), desc="sensitivity", leave=False):
        for k in [INDEX_OF[s] for s in states if s or i < L - 1]:
            x = inputs[i]
            for j in range(i, L):
                x = model.blocks[j](x, B, [(int(STATES[k]) if j == i else 4, None)], scale[j], rope)
            damage[i, k] = kl(full, model.head(model.norm(x)).float().log_softmax(-1)).mean()
    return damage


# ----------------------------------------------------------------------------------------------------------
# 3b Learn: Fisher labels, and a scorer that predicts them


class Gated:
    """Stands in for a layer: x W^T with a gate a = 0 a token towards each state's weights. gates (3, n): skip, INT4, INT8."""

    def __init__(self, linear, gates, fill_from=None):
        self.linear, self.gates, self.fill_from = linear, gates, fill_from

    def __call__(self, x):
        y = F.linear(x, self.linear.weight)
        with torch.no_grad():
            int4, int8 = self.linear.low[1](x) - y, self.linear.low[2](x) - y
        y = torch.addcmul(torch.addcmul(y, self.gates[1, :, None], int4), self.gates[2, :, None], int8)
        if self.fill_from is not None:  # a skipped token's keys and values are in INT4
            y = torch.addcmul(y, self.gates[0, :, None], F.pad(int4[:, self.fill_from :], (self.fill_from, 0)))
        return y


def fisher_labels(model, window, scale, draws, generator, watch=None):
    """Half the squared derivative of the sequence's log-likelihood by every gate, averaged over draws of the targets.

    window (T,) -> (T, L - 1, 3): blocks 2..L by skip, INT4, INT8; nats. `watch(i, x)` sees every block's input x (T, C).
    """
    L, T, x, rope = len(model.blocks), len(window), model.embed(window), model.rope(0, len(window))
    gates = [torch.zeros(3, T, device=x.device, requires_grad=True) for _ in range(L)]
    for i, (block, gate) in enumerate(zip(model.blocks, gates)):
        if watch:
            watch(i, x.detach())
        if i == 0:
            x = block(x, 1, [(4, None)], 1.0, rope)
            continue
        for name, linear in block.linears().items():
            linear.low["gate"] = Gated(linear, gate, block.q_size if name == "qkv" else None)
        y = block(x, 1, [("gate", None)], 1.0, rope)
        x = y if i == L - 1 else torch.addcmul(y, gate[0, :, None], (scale[i] * x - y).detach())
        for linear in block.linears().values():
            del linear.low["gate"]
    hidden, labels = model.norm(x), 0.0
    with torch.no_grad():
        p = model.head(hidden).softmax(-1)
        expected = p @ model.head.weight
    for _ in range(draws):  # d log p(target) / d hidden: the target's row of the head minus the expected row
        target = torch.multinomial(p.cpu(), 1, generator=generator)[:, 0].to(p.device)
        slopes = torch.autograd.grad(hidden, gates[1:], model.head.weight[target] - expected, retain_graph=True)
        labels = labels + torch.stack(slopes).square() / (2 * draws)
    return labels.permute(2, 0, 1)


def gather_labels(model, tokens, scale, horizon, seed, checkpoint, draws=2):
    """Labels of all windows (n, T) and what the scorer will see: (labels (n T, L - 1, 3), {plan: hidden states (n T, C)}).

    Saved every few windows; every window draws from its own generator, so a resumed run draws the same.
    """
    L = len(model.blocks)
    plans = [i for i in range(L) if plan(i, L, horizon)]
    parts = [checkpoint.tensors] if checkpoint.meta["step"] else []
    for n in tqdm(range(checkpoint.meta["step"], len(tokens)), desc="fisher labels", initial=checkpoint.meta["step"], total=len(tokens)):
        part = {}

        def watch(i, x):
            if i in plans:
                part[f"input.{i}"] = x.bfloat16()

        part["labels"] = fisher_labels(model, tokens[n], scale, draws, torch.Generator().manual_seed(seed * 1000003 + n), watch)
        parts.append(part)
        if (n + 1) % 4 == 0 or n + 1 == len(tokens):
            parts = [{k: torch.cat([p[k].to(tokens.device) for p in parts]) for k in part}]
            checkpoint.write(n + 1, parts[0])
    return parts[0]["labels"].to(tokens.device), {i: parts[0][f"input.{i}"].to(tokens.device) for i in plans}


def fit(scorer, labels, inputs, T, horizon, seed, epochs=6, batch=256, lr=1e-3):
    """Fit log damage to labels (N, L - 1, 3) of windows of T tokens: the loss r + y exp(-r) is least where exp(r) is E[y].

    y: label over its block's mean, cut at 50; r: predicted log damage minus the block's log mean; weighted by the root of
    the block mean. The scorer starts at the means: its bias is set to their logarithm.
    """
    L, N = len(scorer.bias), len(labels)
    mean = labels.mean(0).clamp(min=1e-12)  # (L - 1, 3)
    y, weight = (labels / mean).clamp(max=50), mean.sqrt() / mean.sqrt().sum()
    weight[-1, 0] = 0.0  # the last block is never skipped
    with torch.no_grad():
        scorer.bias[1:, :, :3] = mean.log()[:, None]
    features = {i: scorer.features(x.view(-1, T, x.shape[-1]), 0).flatten(0, 1) for i, x in inputs.items()}
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
            for i, f in features.items():
                blocks = plan(i, L, horizon)
                these = slice(blocks[0] - 1, blocks[-1])
                r = scorer.log_damage(f[rows, None], blocks)[:, 0, :, :, :3].mean(2) - mean[these].log()
                loss = loss + ((r + y[rows, these] * (-r).exp()) * weight[these]).sum((1, 2)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
            optimizer.step()
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
            logp = (self.priced(self.scorer(features, blocks), blocks) / self.tau).log_softmax(-1)
            before, chosen = (index[blocks[0] - k : blocks[-1] + 1 - k].permute(1, 2, 0)[..., None] for k in (1, 0))
            logp = logp.gather(3, before[..., None].expand(-1, -1, -1, 1, 4))[..., 0, :]  # (B, T, g, 4): the row of s
            out.append(logp.gather(3, chosen)[..., 0].permute(2, 0, 1))
        return torch.cat(out)


def leave_one_out(G, rollouts):
    """The baseline b of Eq 16: the mean G of the other rollouts of the same window. G (L, B * rollouts, T)."""
    g = G.unflatten(1, (-1, rollouts))
    return ((g.sum(2, keepdim=True) - g) / (rollouts - 1)).flatten(1, 2)


def learn(policy, model, pool, beta, unit, steps, target_cost, checkpoint, log):
    """REINFORCE on windows of the pool (n, T); trains policy.scorer in place. Resumes from `checkpoint` when it has a step.

    unit: what a difference of 1 in q / tau is worth at the start, in nats, so that exploration has the scale of the damage.
    """
    generator = torch.Generator().manual_seed(checkpoint.seed)
    optimizer = torch.optim.Adam(policy.scorer.parameters(), LR)
    start = checkpoint.restore(policy, optimizer, generator)
    policy.generator = generator
    nats = torch.cat([target_log_probs(model, rows) for rows in tqdm(pool.split(4), desc="full model", leave=False)])
    bar = tqdm(range(start, steps), desc="policy gradient", initial=start, total=steps)
    for step in bar:
        pick = torch.randperm(len(pool), generator=generator)[:BATCH]
        tokens = pool[pick].repeat_interleave(ROLLOUTS, 0)
        policy.tau, policy.seen = unit * temperature(step, steps), {}
        r_acc = accuracy_reward(target_log_probs(model, tokens, policy), nats[pick].repeat_interleave(ROLLOUTS, 0))
        states = policy.states[:, :, :-1]  # the last token of a window has no target, so no reward
        G = returns(rewards(states, r_acc, beta, STATES if policy.settings["cost"] == "bits" else policy.costs))[1:]
        advantage = G - leave_one_out(G, ROLLOUTS)
        scale = advantage.std(dim=(1, 2), keepdim=True) + 1e-6  # ours: each block's advantages in units of their spread
        logp = policy.log_pi()[:, :, :-1]
        loss = total_loss(0.0, policy_gradient(logp, advantage / scale, 0.0), ALPHA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cost = mean_cost(policy.states, policy.costs)
        policy.mu += 0.5 * unit * (cost - target_cost)  # ours: the price holds the sampled cost at the target
        line = {"step": step, "r_acc": r_acc.mean().item(), "cost": cost, "mu": policy.mu, "tau": policy.tau, "loss": loss.item()}
        log.write(json.dumps(line) + "\n")
        log.flush()
        bar.set_postfix(r_acc=f"{line['r_acc']:+.4f}", cost=f"{cost:.2f}")
        if (step + 1) % 5 == 0 or step + 1 == steps:
            checkpoint.save(step + 1, policy, optimizer, generator)
    policy.tau = None


@torch.no_grad()
def target_log_probs(model, tokens, policy=None):
    """log p of every next token: (B, T) -> (B, T - 1). Head and softmax row by row, to keep memory small."""
    hidden = model.hidden(tokens, policy)
    return torch.stack([-F.cross_entropy(model.head(h[:-1]).float(), t[1:], reduction="none") for h, t in zip(hidden, tokens)])


class Checkpoint:
    """Everything that the rest of a run depends on, in one safetensors file; written whole, no pickle."""

    def __init__(self, path, settings, seed, resume):
        settings = dict(settings)
        self.path, self.settings, self.seed, self.tensors, self.meta = Path(path), settings, seed, {}, {"step": 0}
        if resume and self.path.exists():
            self.tensors, self.meta = read_safetensors(path)
            if self.meta.get("settings") != settings:
                other = {k: v for k, v in self.meta.get("settings", {}).items() if settings.get(k) != v}
                raise ValueError(f"{path} belongs to a run with other settings ({other}); repeat them, or start anew without --resume")

    def write(self, step, tensors, **more):
        meta = {"step": step, "settings": self.settings, **more}
        write_whole(self.path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"dash": json.dumps(meta)}))

    def save(self, step, policy, optimizer, generator):
        tensors = {f"scorer.{k}": v for k, v in policy.scorer.state_dict().items()}
        for name, p in policy.scorer.named_parameters():
            tensors |= {f"adam.{name}.{k}": v for k, v in optimizer.state[p].items()}
        tensors["generator"] = generator.get_state()
        self.write(step, tensors, mu=policy.mu)

    def restore(self, policy, optimizer, generator):
        """Put scorer, optimizer, generator and price back; returns the step to go on with, 0 for a fresh run."""
        if self.meta["step"] == 0:
            return 0
        policy.scorer.load_state_dict({k[7:]: v for k, v in self.tensors.items() if k.startswith("scorer.")})
        for name, p in policy.scorer.named_parameters():
            prefix = f"adam.{name}."
            optimizer.state[p] = {k[len(prefix):]: v for k, v in self.tensors.items() if k.startswith(prefix)}
        generator.set_state(self.tensors["generator"])
        policy.mu = self.meta["mu"]
        return self.meta["step"]


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
def calibrate_prices(policy, model, tokens, targets, goals, rounds=2):
    """The price for every target speedup, closed loop: sets policy.prices to [(speedup, mu)]; goals are the mean costs wanted.

    Open loop first: with q of the full model's hidden states the cost at any mu is a look-up, so mu is found by bisection.
    Then all targets run at once, each with its own price and a copy of the tokens (n, T), and what the closed loop adds
    to the cost is taken off the open-loop goal.
    """
    L, look = len(policy.scale), OpenLoop(policy)
    model.hidden(tokens, look)

    def open_cost(mu):
        policy.mu, states = mu, torch.full((L, *tokens.shape), 4, dtype=torch.uint8, device=tokens.device)
        for blocks, table in look.tables.items():
            states[blocks[0] : blocks[-1] + 1] = policy.choose(table, blocks, states[blocks[0] - 1])
        return mean_cost(states, policy.costs)

    def price(goal):
        span = max(float(t.max() - t.masked_fill(t.isinf(), 0).min()) for t in look.tables.values()) / float(policy.costs[1] - policy.costs[0])
        low, high = -span, span
        for _ in range(40):
            mu = (low + high) / 2
            low, high = (mu, high) if open_cost(mu) > goal else (low, mu)
        return mu

    aims = list(goals)
    best = [(float("inf"), 0.0)] * len(targets)
    for _ in tqdm(range(rounds), desc="prices", leave=False):
        mus = [price(aim) for aim in aims]
        policy.mu = torch.tensor(mus).repeat_interleave(len(tokens)).to(tokens.device)
        model.hidden(tokens.repeat(len(targets), 1), policy)
        for n, states in enumerate(policy.states.split(len(tokens), dim=1)):
            miss = mean_cost(states, policy.costs) - goals[n]
            best[n] = min(best[n], (abs(miss), mus[n]))
            aims[n] -= miss
    mus = sorted(mu for _, mu in best)  # a higher speedup never has a lower price
    policy.prices, policy.mu = list(zip(targets, mus)), 0.0


# ----------------------------------------------------------------------------------------------------------
# 5 Compare


@torch.no_grad()
def compare(model, tokens, policies, costs):
    """Each policy against the full model on windows (n, T): a list of dicts with means over all predicted tokens.

    nats: -log p of the text; kl: KL(full || routed), nats; top1: share of equal most likely tokens; speedup: in bits;
    states: shares; nll: per-window nats (n,), for intervals. A policy given as None is the full model.
    """
    rows = [{"nll": [], "kl": [], "top1": [], "states": []} for _ in policies]
    for window in tqdm(tokens, desc="compare", leave=False):
        full = log_probs(model, window[None])[0, :-1]
        for row, policy in zip(rows, policies):
            routed = full
            if policy is not None:
                policy = policy(window[None]) if callable(policy) else policy
                routed = log_probs(model, window[None], policy)[0, :-1]
                row["states"].append(policy.states)
            row["nll"].append(-routed.gather(1, window[1:, None]).mean().item())
            row["kl"].append(kl(full, routed).mean().item())
            row["top1"].append((routed.argmax(-1) == full.argmax(-1)).float().mean().item())
    mean = lambda v: sum(v) / len(v)
    out = []
    for row in rows:
        states = torch.cat([s.flatten(1) for s in row["states"]], 1) if row["states"] else torch.full((1, 1), 4)
        out.append({"nats": mean(row["nll"]), "kl": mean(row["kl"]), "top1": mean(row["top1"]), "nll": row["nll"],
                    "speedup": speedup_bits(states, costs), "states": state_shares(states), "raw": states})
    return out


def print_table(names, rows):
    full = rows[0]["nats"]
    print(f"\n{'':26} {'speedup':>8} {'nats':>8} {'lost':>8} {'KL':>8} {'top-1':>7}   share of blocks: skip INT4 INT8 full")
    for name, r in zip(names, rows):
        shares = " ".join(f"{100 * r['states'][s]:4.0f}%" for s in ("0", "1", "2", "4"))
        print(f"{name:26} {r['speedup']:7.2f}x {r['nats']:8.4f} {r['nats'] - full:+8.4f} {r['kl']:8.4f} {100 * r['top1']:6.1f}%   {shares:>38}")


def plot(path, log, states, names, rows):
    """Three panels: reward and cost over training, nats lost by method, states by block."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    a, b, c = figure.subplots(1, 3)
    if "loss" in log[0] and "step" not in log[0]:
        a.plot([x["epoch"] for x in log], [x["loss"] for x in log], marker="o")
        a.set(xlabel="epoch", ylabel="loss", title="Training: fit to Fisher labels")
    else:
        a.plot([x["step"] for x in log], [x["r_acc"] for x in log])
        a.set(xlabel="step", ylabel="R_acc, nats a token", title="Training: reward of the sampled states")
    b.barh(names[1:], [r["nats"] - rows[0]["nats"] for r in rows[1:]], color="tab:blue")
    b.invert_yaxis()
    b.set(xlabel="nats lost against the full model", title="Held-out text")
    b.locator_params(axis="x", nbins=5)
    bottom = torch.zeros(len(states))
    for s, label, color in ((4, "full", "#1b4965"), (2, "INT8", "#5fa8d3"), (1, "INT4", "#bee9e8"), (0, "skip", "#e8e8e8")):
        share = (states == s).float().mean(1)
        c.bar(range(1, len(states) + 1), share, bottom=bottom, label=label, color=color, width=1.0, edgecolor="white")
        bottom += share
    c.set(xlabel="block", ylabel="share of tokens", title=f"DASH, {rows[1]['speedup']:.2f}x", xlim=(0.5, len(states) + 0.5))
    c.legend(loc="lower right")
    save_figure(figure, path)


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


# ----------------------------------------------------------------------------------------------------------


def arguments():
    p = Parser(__doc__)
    p.add_argument("--model", default="smollm2", help="smollm2, a folder in Hugging Face layout, or a hub id")
    p.add_argument("--data", default="pydocs", help="pydocs, wikitext2, or a text file")
    p.add_argument("--data-dir", help="folder with wikitext2/train.txt and so on")
    p.add_argument("--speedup", type=float, default=2.0, help="speedup to train for and show (any is served later)")
    p.add_argument("--cost", default="bits", choices=["bits", "latency"], help="what a speedup counts; latency needs bench.py speed")
    p.add_argument("--horizon", type=int, help="blocks decided from one hidden state: 1 is the paper; default all, one decision a token")
    p.add_argument("--objective", default="fisher", choices=["fisher", "rl"], help="fisher labels, or the paper's policy gradient")
    p.add_argument("--samples", type=int, default=16, help="fisher: windows of 1,024 tokens with labels")
    p.add_argument("--steps", type=int, default=40, help="policy-gradient steps")
    p.add_argument("--out", default="out", help="folder to write into")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return p.parse_args()


def main():
    args, began = arguments(), time.time()
    if args.steps < 1 or args.samples < 1 or (args.horizon or 1) < 1:
        raise ValueError("--steps, --samples and --horizon must be at least 1")
    device, out = pick_device(args.device), Path(args.out)
    torch.manual_seed(args.seed)
    train_text = load_text(args.data, "train", args.data_dir)
    test_text = load_text(args.data, "test", args.data_dir)
    model, tokenizer = load(args.model, device, torch.float32)
    bits, L = bit_costs(model.config), model.config.n_layer
    horizon = min(args.horizon or L, L)
    costs, overhead = (bits, (0.0, 0.0)) if args.cost == "bits" else latency_costs(f"results/speed-{device.type}.json", device)
    targets = [s for s in TARGETS if s <= most_speedup(L, costs, overhead)]
    if not targets or not targets[0] <= args.speedup <= targets[-1]:
        raise ValueError(f"--speedup {args.speedup:g} is out of reach: give {TARGETS[0]} to {(targets or TARGETS)[-1]:.3g}")
    out.mkdir(parents=True, exist_ok=True)

    size = min(WINDOW, model.config.block_size)
    samples = windows(tokenizer, train_text, SAMPLES, min(SAMPLE_TOKENS, size), args.data, spread=True).to(device)
    pool = windows(tokenizer, train_text, POOL, size, args.data, spread=True).to(device)
    long = windows(tokenizer, train_text, args.samples, min(LONG, model.config.block_size), args.data, spread=True).to(device)
    test = windows(tokenizer, test_text, 8, min(512, model.config.block_size), args.data, spread=True).to(device)
    settings = {"model": args.model, "data": args.data, "speedup": args.speedup, "objective": args.objective, "horizon": horizon,
                "steps": args.steps, "samples": len(long), "seed": args.seed, "cost": args.cost, "costs": costs.tolist(),
                "overhead": list(overhead), "int4": codes_name(pool), "fingerprint": model.fingerprint()}
    checkpoint = Checkpoint(out / "checkpoint.safetensors", settings, args.seed, args.resume)

    found = profile(model, samples)
    scale = found["norm_ratio"].tolist()  # measured better than least squares (bench.py ablation)
    cache_codes(model, pool)
    model.quantize(int4=settings["int4"])
    scorer = Scorer(L, model.config.n_embd, LAM if args.objective == "rl" else 0.0).to(device)
    scorer.mean.copy_(found["mean"].mean(0))
    scorer.std.copy_(found["std"].square().mean(0).sqrt())

    damage, log_path = torch.zeros(L, 4), out / "train.jsonl"
    if args.objective == "fisher":
        labels, inputs = gather_labels(model, long, scale, horizon, args.seed, checkpoint)
        # a skip is too large a change for a second-order estimate: hold its mean, block by block, to the measured KL
        skip = sensitivities(model, pool[len(pool) // 2][None], scale, states=[0])[1:, 0].to(device)
        labels[..., 0] *= skip / labels[..., 0].mean(0).clamp(min=1e-12)
        mean, log = fit(scorer, labels, inputs, long.shape[1], horizon, args.seed)
        damage[1:, :3] = mean.cpu()
        write_whole(log_path, "".join(json.dumps(line) + "\n" for line in log).encode())
    else:
        damage = sensitivities(model, pool[:: max(1, len(pool) // 2)][:2], scale)
        scorer.bias.data[1:, :, :3] = damage[1:, None, :3].clamp(min=1e-12).log().to(device)
    settings["damage"] = damage.tolist()  # what a static plan goes by
    target_cost = goal_cost(args.speedup, L, overhead)
    mu, static = static_plan(damage, costs, target_cost)
    if args.objective == "rl":
        rollout = Rollout(scorer, scale, costs, settings["fingerprint"], horizon=horizon, settings=settings).to(device)
        rollout.mu = mu
        kept = log_path.read_text().splitlines()[: checkpoint.meta["step"]] if checkpoint.meta["step"] else []
        write_whole(log_path, "".join(line + "\n" for line in kept).encode())
        unit = float((damage[1:, 1] - damage[1:, 2]).abs().median().clamp(min=1e-9))
        with open(log_path, "a") as log:
            learn(rollout, model, pool, 4 * mu, unit, args.steps, target_cost, checkpoint, log)

    policy = Policy(scorer, scale, costs, settings["fingerprint"], horizon=horizon, settings=settings).to(device)
    calibrate_prices(policy, model, pool[:: max(1, len(pool) // 4)][:4], targets, [goal_cost(s, L, overhead) for s in targets])
    policy.save(out / "policy.safetensors")

    policy.at(args.speedup)
    generator = torch.Generator().manual_seed(args.seed)
    equal = lambda window: Fixed(random_states((L, *window.shape), mean_cost(policy.states, costs), costs, generator), scale)
    int8 = Fixed([4] + [2] * (L - 1))
    names = ["full model", f"DASH at {args.speedup:g}x", "static, same cost", "random states, same cost", "all INT8"]
    rows = compare(model, test, [None, policy, Fixed(static, scale), equal, int8], bits)
    print_table(names, rows)
    log = [json.loads(line) for line in log_path.read_text().splitlines()]
    plot(out / "train.png", log, rows[1].pop("raw"), names, rows)
    save_result(out / "train.json", device, model, args.seed, seconds=round(time.time() - began), tokens=test.numel(), settings=settings,
                rows=[{"name": name} | {k: v for k, v in row.items() if k != "raw"} for name, row in zip(names, rows)])
    print(f"\nheld-out {args.data}: {test.numel()} tokens, {args.model} in fp32 on {device}, INT4 by GPTQ")
    print(f"wrote policy.safetensors, train.json, train.jsonl and train.png into {out} in {time.time() - began:.0f} s")


if __name__ == "__main__":
    command_line(main)
