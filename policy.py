"""The Markov decision process: states, costs, scorer, rewards, price; and the policy file.

For every token, before every block i, an agent picks the block's state s_i, which is also its cost in units of 4 bits
a weight: 0 skip, 1 INT4, 2 INT8, 4 as loaded. The first block always runs in state 4, the last is never skipped.
Equation numbers are those of DASH (arXiv 2505.17420):

    (3-5)   minimise E[cost] subject to a bound on the distance of the outputs; here by its Lagrangian: a price mu
    (8-10)  q(s' | h, i, s) = MLP([h; E(i); E(i+1); e(s); e(s')]) - lam |s' - s| / 4        `Scorer`
    (11)    in training  s' ~ softmax((q - mu cost) / tau), tau decaying                    `sample`, `temperature`
    (12)    R_i = w_i R_acc + beta R_eff(i)                                                 `rewards`
    (13)    R_acc = log p_routed - log p_full of the same token, or +1 / -1                 `accuracy_reward`
    (14)    w_i = sigmoid((S_total - S_1..i) / S_max)                                       `block_weights`
    (15)    R_eff(i) = 1 - s_i / 4                                                          `efficiency_reward`
    (16)    PG = -mean[(G_i - b) log pi(s_i)],  G_i = sum_{j>=i} R_j                        `returns`, `policy_gradient`
    (17)    loss = CE + alpha PG                                                            `total_loss`
    (18)    at inference  s' = argmax q - mu cost                                           `Policy.choose`, `OneToken`
    (19-20) block i+1 is decided from h_{i-1}, the input of the block that runs;            `plan`
            by default the whole path from h_1

Eq 11-17 are put to use in reinforce.py; by default the labels of fisher.py take their place.

Everything in q but h takes few values. So E(i), E(i+1) act as a gain and a shift of the second hidden layer, looked up
by block, and e(s), e(s') as a bias of the output, looked up by block and state: d + 2 -> 128 -> 128 -> 4 states in one go.
The guess h_i ~ a_i h_{i-1} of Eq 19 needs no arithmetic: the scorer normalises its input and a_i cancels.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import device_name, read_safetensors, refusing, write_safetensors

STATES = torch.tensor([0, 1, 2, 4])  # index -> state
INDEX = torch.tensor([0, 1, 2, -1, 3])  # state -> index
STATE_OF, INDEX_OF = STATES.tolist(), INDEX.tolist()  # the same as lists


# ----------------------------------------------------------------------------------------------------------
# Costs


def bit_costs(config, policy=None):
    """Cost of the four states in units of 4 bits a weight: a skip still fills keys and values in INT4, unless kv is "none".

    Returns (4,) fp32; the first is params(k, v) / params(block) of an LLM configuration (weights.Config). For a policy that gives
    attention and MLP states of their own (2, 4): the costs of each, in proportion to its parameters. A policy may name what else it
    runs, `extra`: 16-bit weights per token, shared out among the blocks, and per skipped block or MLP (routers and adapters).
    """
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    block = 2 * q + 2 * kv + 3 * config.n_hidden
    fill = 0.0 if policy is not None and policy.kv == "none" else 2 * kv / block
    router, adapter = (4 * n / (block * config.n_embd) for n in getattr(policy, "extra", (0, 0)))
    router = router / config.n_layer
    if policy is None or len(policy.scale) == config.n_layer:
        return torch.tensor([fill + adapter, 1.0, 2.0, 4.0]) + router
    attention = (2 * q + 2 * kv) / block
    halves = [[fill, *(s * attention for s in (1, 2, 4))], [adapter, *(s * (1 - attention) for s in (1, 2, 4))]]
    return torch.tensor(halves) + torch.tensor([[router], [0.0]])


def latency_costs(path, device, fingerprint, horizon):
    """The latency cost that `python bench.py speed` measured: milliseconds a block and state, in units of a quarter of state 4, with the
    decisions of a policy of this horizon.

    Returns costs (4,) with 4.0 for state 4, and what a token costs besides its blocks in the same units and summed over the
    path: (full model, which on a GPU is one graph and so takes less; routed model with its decisions). FileNotFoundError or ValueError says
    what to run.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: --cost latency needs the measured times; run python bench.py speed first")
    with refusing(path, "holds no latency table", "run python bench.py speed again"):
        result = json.loads(Path(path).read_text())
        decided = result.get("policy", {}).get("horizon")
        table = result["latency_ms"]
        unit = table["4"] / 4
        costs = torch.tensor([table[str(s)] / unit for s in STATE_OF])
        overhead = (table.get("full_overhead", table["overhead"]) / unit, (table["overhead"] + table["decision"]) / unit)
        if not costs.isfinite().all() or not (costs > 0).all():
            raise ValueError("times are not positive")
    if result.get("device") != device_name(device):
        raise ValueError(f"{path} was measured on {result.get('device')}, this is {device_name(device)}; run python bench.py speed here")
    if result.get("fingerprint") != fingerprint:
        raise ValueError(f"{path} has the times of another model ({result.get('model')}); run python bench.py speed with this one")
    if decided != horizon:
        raise ValueError(f"{path} has the decisions of horizon {decided}; run python bench.py speed --policy FILE with a policy of horizon {horizon}")
    return costs, overhead


def mean_cost(states, costs):
    """states (L, ...) in 0, 1, 2, 4 -> mean cost of a block, a float. With costs (2, 4): states (2 L, ...), attention and MLP in turn."""
    if costs.dim() == 2:
        return mean_cost(states[::2], costs[0]) + mean_cost(states[1::2], costs[1])
    share = torch.bincount(INDEX[states.long().cpu()].flatten(), minlength=4) / states.numel()
    return float((share * costs.cpu()).sum())


def speedup_bits(states, costs):
    """4 L N / (sum of costs) over all N tokens: states (L, ...) -> a float."""
    return 4 / mean_cost(states, costs)


def goal_cost(speedup, n_layer, overhead=(0.0, 0.0)):
    """The mean cost of a block that gives a speedup of (4 L + overhead of full) / (L cost + overhead of routed)."""
    return ((4 * n_layer + overhead[0]) / speedup - overhead[1]) / n_layer


def most_speedup(n_layer, costs, overhead=(0.0, 0.0)):
    """The highest speedup that a policy can reach: every block but the first and the last skipped, the last in INT4."""
    return (4 * n_layer + overhead[0]) / float(4 + (n_layer - 2) * costs[0] + costs[1] + overhead[1])


def state_shares(states):
    """states of any shape -> {"0": share, "1": ..., "2": ..., "4": ...}."""
    counts = torch.bincount(INDEX[states.long().cpu()].flatten(), minlength=4).tolist()
    return {str(s): n / states.numel() for s, n in zip(STATE_OF, counts)}


# ----------------------------------------------------------------------------------------------------------
# Scorer, Eq 8-10


class Scorer(nn.Module):
    """q(s' | h, i, s) for all s, s' and several blocks i from one hidden state.

    q is minus the damage that running block i in s' is expected to do, in nats, so state 4 has q = 0 (less lam times
    the distance from s); the network gives the damage's logarithm. Two hidden layers of `width`. Input: h RMS-normalised, standardised
    per channel (`mean`, `std`), clamped to +-`CLAMP`, and two features of the position t, [t = 0] and 1 / (1 + t). One decision is a
    handful of small operators, however many blocks it covers: the first layer is shared, the second is shifted and scaled for each block.
    With lam = 0, labels (fisher.py), which do not know s, leave q the same for all s; the policy gradient does not.

    `OneToken` repeats this arithmetic for single tokens from all its tensors, and `Policy.load` makes one of the width of a file: change all three.
    """

    CLAMP, DROPOUT = 5.0, 0.1

    def __init__(self, n_layer, n_embd, lam=0.0, width=128):
        super().__init__()
        self.lam = lam
        self.register_buffer("mean", torch.zeros(n_embd))
        self.register_buffer("std", torch.ones(n_embd))
        self.first = nn.Linear(n_embd + 2, width)
        self.second = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(n_layer, width))
        self.shift = nn.Parameter(torch.zeros(n_layer, width))
        self.third = nn.Linear(width, 4, bias=False)
        self.bias = nn.Parameter(torch.zeros(n_layer, 4, 4))  # block, s, s': the logarithm of the static damage
        never = torch.zeros(n_layer, 1, 4)
        never[-1, :, 0] = -math.inf  # the last block is never skipped
        self.register_buffer("never", never, persistent=False)
        self.register_buffer("smooth", (STATES[:, None] - STATES).abs() / 4, persistent=False)
        self.register_buffer("sign", torch.tensor([-1.0, -1.0, -1.0, 0.0]), persistent=False)
        nn.init.zeros_(self.third.weight)
        self.eval()

    @staticmethod
    def positions(start, T, device):
        """The two features of the positions start..start+T-1: (T, 2) fp32."""
        return torch.tensor([[float(t == 0), 1 / (1 + t)] for t in range(start, start + T)], device=device)

    def features(self, h, start):
        """h (B, T, d) hidden states at positions start.. -> (B, T, d + 2) fp32. `start` may be a row of `positions` instead of a number."""
        B, T, d = h.shape
        x = h.float()
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).add_(1e-6)
        # (x / rms - mean) / std in one operator: a decision of one token is all operators, hardly any arithmetic
        x = torch.addcdiv(self.mean / -self.std, x, self.std * norm, value=math.sqrt(d)).clamp_(-self.CLAMP, self.CLAMP)
        position = start if torch.is_tensor(start) else self.positions(start, T, h.device)
        return torch.cat([x, position.expand(B, T, 2)], dim=-1)

    def of_blocks(self, blocks):
        """What is looked up by block, for a range of g 0-based numbers: gain and shift (g, width), bias (g, 4, 4), never (g, 1, 4)."""
        return [t[blocks[0] : blocks[-1] + 1] for t in (self.gain, self.shift, self.bias, self.never)]

    def log_damage(self, features, gain, shift, bias):
        """features (B, T, d + 2) and what is looked up -> (B, T, g, 4, 4), the last two s and s'."""
        u = F.silu(F.linear(features, self.first.weight, self.first.bias))
        if self.training:  # drawn on the CPU, so that every device learns the same
            u = u * F.dropout(torch.ones(u.shape), self.DROPOUT).to(u.device)
        u = F.linear(u, self.second.weight, self.second.bias)[..., None, :]
        v = F.silu(torch.addcmul(shift, u, gain))
        return F.linear(v, self.third.weight)[..., None, :] + bias

    def forward(self, features, blocks):
        """q(s' | h, i, s) for a range of blocks, shapes as `log_damage`; -inf for skipping the last block."""
        return self.q(features, *self.of_blocks(blocks))

    def q(self, features, gain, shift, bias, never):
        q = torch.addcmul(never, self.log_damage(features, gain, shift, bias).exp_(), self.sign)
        return q - self.lam * self.smooth if self.lam else q


def plan(i, n_layer, horizon):
    """The blocks (0-based) that are decided from the input of block i (0-based), an empty range for most i.

    horizon 1 is the paper (Eq 19-20): block i + 1 from the input of block i. A longer horizon g waits for the output of the
    first block, plans the g blocks after it, and plans the next g from the input of the last of them; g = L (or more) plans
    the whole path once. Horizon 0 decides each block from its own input: nothing is guessed, nothing can overlap.
    """
    if horizon < 2:  # one block: this one, or the next
        first, end = i + horizon, i + horizon + 1
    elif i == 1:  # the first plan waits for the output of the first block
        first, end = 1, 1 + horizon
    elif i and i % horizon == 0:  # the next ones are made at the last block that is planned
        first, end = i + 1, i + 1 + horizon
    else:
        return range(0)
    return range(max(1, first), min(end, n_layer))


def walk(best, state):
    """Follow a path from a state: best, for each block the best s' for every s (indices) -> the states, a list."""
    s = INDEX_OF[state]
    path = []
    for row in best:
        s = row[s]
        path.append(STATE_OF[s])
    return path


class OneToken:
    """What `Policy.choose` chooses from `Scorer.q` (Eq 18), for single tokens: all that does not depend on the token is multiplied out beforehand.
    While a model decodes, every operator finds the caches cold and takes some 10 us, so here are half as many."""

    @torch.inference_mode(False)  # generation may come first, and whoever trains must be able to use it too
    @torch.no_grad()
    def __init__(self, scorer, allowed):
        d = scorer.mean.numel()
        self.scorer, self.allowed = scorer, allowed
        self.spread, self.center = scorer.std / math.sqrt(d), -scorer.mean / scorer.std
        first, positions = scorer.first.weight.T.contiguous().split([d, 2])
        self.first, self.later = first, positions[1]
        self.bias = [scorer.first.bias.clone(), scorer.first.bias + positions[0]]  # at all positions but the first, and there
        self.second, self.second_bias = scorer.second.weight.T.contiguous(), scorer.second.bias.clone()
        self.third = scorer.third.weight.T.repeat(1, 4)  # s and s' side by side, 16
        never = scorer.never.masked_fill(~torch.isin(STATES, torch.tensor(allowed)).to(scorer.never.device), -math.inf)
        static = scorer.bias.where(scorer.sign < 0, -math.inf).where(never == 0, math.inf).flatten(1)  # none in state 4, endless where not allowed
        tables = scorer.gain.clone(), scorer.shift.clone(), static
        self.of_blocks = functools.cache(lambda blocks: [t[blocks[0] : blocks[-1] + 1] for t in tables])
        self.smooth = scorer.lam * scorer.smooth if scorer.lam else None

    def __call__(self, x, start, blocks, mu, costs):
        """x (1, 1, C) at position `start`, a range of blocks, costs (4,) -> for each block and each s the best s', indices, a list of lists."""
        gain, shift, static = self.of_blocks(blocks)
        x = x.view(1, -1).float()
        norm = torch.linalg.vector_norm(x).item() + 1e-6
        x = torch.addcdiv(self.center, x, self.spread, value=1 / norm).clamp_(-Scorer.CLAMP, Scorer.CLAMP)
        u = F.silu(torch.addmm(torch.add(self.bias[start == 0], self.later, alpha=1 / (1 + start)), x, self.first))
        v = F.silu(torch.addcmul(shift, torch.addmm(self.second_bias, u, self.second), gain))
        loss = torch.add(torch.addmm(static, v, self.third).exp_().view(-1, 4, 4), costs, alpha=mu)
        return (loss if self.smooth is None else loss + self.smooth).argmin(-1).tolist()


# ----------------------------------------------------------------------------------------------------------
# Policies: what `LLM.forward` takes. Any object with these five members is one:
#     states  (L, B, T) uint8: the model sets it to 4s at every call, `decide` writes into it
#     decide(i, x, start)  called before block i with its input x (B, T, C), whose first token has position `start`; writes states[i] or later ones
#     scale   for each block a_i (Eq 6), or a function of the skipped rows (model.skip), which may have a `gain` for all rows (model.weigh)
#     kv      where later tokens find keys and values of a token that skips: "fill" (its own input through k_proj and v_proj in INT4),
#             "copy" (the same from the input of the last block that it ran), "none" (nowhere)
#     int4    the name of the cached INT4 codes that it goes with, or None
# With 2 L scales, states are of halves: attention of block 1, its MLP, attention of block 2... What it runs besides is `extra` (bit_costs).


class Fixed:
    """States given beforehand: (L,) the same for every token, or (L, B, T) as recorded from an earlier call."""

    def __init__(self, states, scale=None, kv="fill"):
        given = torch.as_tensor(states).cpu()
        if not torch.isin(given.double(), STATES.double()).all():
            raise ValueError("states are 0, 1, 2 and 4")
        self.given = given.to(torch.uint8)
        self.int4 = None
        self.kv = kv
        self.scale = [1.0] * len(self.given) if scale is None else scale
        if len(self.scale) != len(self.given):
            raise ValueError(f"{len(self.given)} blocks have states and {len(self.scale)} a scale")
        self.states = None

    def window(self, start, T):
        """States of T positions from `start` on: (L, B, T), or (L, 1, 1) or (L, 1, T) where all tokens or sequences are alike."""
        if self.given.dim() < 3:
            return self.given[:, None, None]
        if start + T > self.given.shape[2]:
            raise ValueError(f"states are given for {self.given.shape[2]} positions, and {start + T} were run")
        return self.given[..., start : start + T]

    def decide(self, i, x, start):
        if i == 0:  # all at once: 30 small copies take a hundredth of a token
            self.states.copy_(self.window(start, x.shape[1]))


def random_states(shape, cost, costs, generator):
    """Every (block, token) at random between the two states around a mean cost: the baseline "at equal cost".

    shape (L, B, T); first block state 4. A cost below that of INT4 mixes skips with INT4. Returns (L, B, T) uint8.
    """
    L = shape[0]
    values = costs.tolist()
    rest = (cost * L - 4) / (L - 1)
    if rest < values[1]:  # skips, but not of the last block
        rest = (cost * L - 4 - values[1]) / max(L - 2, 1)
    below = max(k for k in range(3) if k == 0 or values[k] <= rest)
    step = values[below + 1] - values[below]  # 0 where by the clock a skip costs what INT4 does
    share = (rest - values[below]) / step if step else 1.0
    pick = below + (torch.rand(shape, generator=generator) < share).long()
    pick[-1].clamp_(min=1)
    pick[0] = 3
    return STATES[pick].to(torch.uint8)


def lowest_price(cost_at, goal, low=0.0, high=1e4):
    """The lowest price mu in low..high at which cost_at(mu), which falls as mu rises, is within the goal; by bisection."""
    for _ in range(60):
        mu = (low + high) / 2
        low, high = (mu, high) if cost_at(mu) > goal else (low, mu)
    return high


def possible(damage):
    """A copy of damage (..., L, 4) over STATES, infinite for what is never done: the first block runs in state 4, the last is not skipped."""
    damage = damage.clone()
    damage[..., 0, :3], damage[..., -1, 0] = math.inf, math.inf
    return damage


def static_plan(damage, costs, target):
    """The best single plan for all tokens at a mean cost, if damage adds up: (price mu, states (L,) uint8).

    damage (L, 4) and costs (4,), over STATES. `argmin damage + mu cost` for the lowest price that keeps within the target,
    then what is left of the budget goes to the blocks where it saves most.
    """
    L = len(damage)
    damage, costs = possible(damage), costs.cpu()
    price = lowest_price(lambda mu: float(costs[(damage + mu * costs).argmin(-1)].sum()), target * L)
    pick = (damage + price * costs).argmin(-1)
    while True:
        gain = damage.gather(1, pick[:, None]) - damage
        extra = costs - costs[pick][:, None]
        fits = (extra > 0) & (gain > 0) & (costs[pick].sum() + extra <= target * L + 1e-6)
        if not fits.any():
            return price, STATES[pick].to(torch.uint8)
        best = torch.where(fits, gain / extra, -math.inf).flatten().argmax()
        pick[best // 4] = best % 4


POSITIONS = 11  # buckets of positions: t = 0, 1, 2-3, 4-7, ..., 512 and beyond


def position_bucket(t):
    """Positions t, an int64 tensor of any shape -> their bucket 0..POSITIONS - 1, the number of binary digits of t, at most POSITIONS - 1."""
    return torch.bucketize(t, 2 ** torch.arange(POSITIONS - 1, device=t.device), right=True)


@dataclass(eq=False)
class Policy:
    """A trained scorer with all that is needed to use it."""

    PATIENCE = 32  # tokens over which the price pays back what was overspent

    scorer: Scorer
    scale: list  # [a_i], L floats (Eq 7)
    costs: torch.Tensor  # (4,) of the states
    fingerprint: str  # `LLM.fingerprint()` of the model it was trained for
    prices: list = ()  # [(speedup, mu)] rising in speedup, in the cost named by settings["cost"] ("bits" or "latency")
    horizon: int = 1  # see `plan`
    settings: dict = None  # how it was made, and the damage that plans by block go by
    mu: float = None  # the price in use, None until `at` sets it; or a tensor, (B,) one a sequence or (B, T) one a token
    tracked: float = None  # the speedup that the price follows while decoding
    tau: float = None  # temperature of sampling, by `generator`
    generator: torch.Generator = None
    states: torch.Tensor = None  # and kv: see "Policies" above
    kv: str = "fill"
    allowed: tuple = (0, 1, 2, 4)  # the states to choose from (ablations)

    def __post_init__(self):
        self.settings = self.settings or {}
        self.int4 = self.settings.get("int4")
        self.one_token = None

    def at(self, speedup, track=False):
        """Use the price for this speedup and return self. ValueError when no price was calibrated for it.

        track: while decoding, let the price follow what was spent (`follow`), so that what it adds comes near the speedup.
        """
        targets = [s for s, _ in self.prices]
        if not targets or not targets[0] <= speedup <= targets[-1]:
            reach = f"{targets[0]:g} to {targets[-1]:g}" if targets else "nothing"
            raise ValueError(f"speedup {speedup:g} is out of reach: this policy was calibrated for {reach}")
        self.mu = self.price(speedup)
        self.one_token = None  # the scorer may have learned since
        self.tracked = speedup if track else None
        self.owed = 0.0
        self.cost_of = dict(zip(STATE_OF, self.costs.tolist()))
        return self

    def price(self, speedup):
        """mu for a speedup: interpolated between the calibrated ones; the lowest's below them, extrapolated above."""
        targets = [s for s, _ in self.prices]
        if len(targets) == 1:
            return self.prices[0][1]
        speedup = max(speedup, targets[0])
        high = min(max(1, sum(s < speedup for s in targets)), len(targets) - 1)
        (s0, mu0), (s1, mu1) = self.prices[high - 1], self.prices[high]
        return mu0 + (mu1 - mu0) * (speedup - s0) / (s1 - s0)

    def follow(self, path):
        """After a decoded token, whose blocks ran in the states `path`, a list (of a batch L * B of them: one price serves all): aim the
        next price at the goal less a share of what this text's tokens have overspent (ours).

        An integral controller over the calibrated prices: a bias of the text is paid back within about `PATIENCE` tokens.
        """
        L = len(self.scale)
        overhead = self.settings.get("overhead", (0.0, 0.0))
        goal = goal_cost(self.tracked, L, overhead)
        self.owed += sum(self.cost_of[s] for s in path) / len(path) - goal  # `mean_cost`, in Python numbers: one token has to be quick
        aim = max(goal - self.owed / self.PATIENCE, 0.01)
        self.mu = self.price((4 * L + overhead[0]) / (L * aim + overhead[1]))

    def to(self, device):
        self.one_token = None
        self.scorer.to(device)
        self.costs = self.costs.to(device)
        return self

    def check(self, model):
        """ValueError unless the policy was trained for this model."""
        if model.fingerprint() != self.fingerprint:
            trained = self.settings.get("model", "another model")
            raise ValueError(f"this policy was trained for {trained} ({self.fingerprint}), not for {model.name} ({model.fingerprint()}); "
                             f"give --model {trained}, or train one with python train.py --model {model.name}")

    def decide(self, i, x, start):
        if i == 0 and start == 0 and self.tracked:  # a new text
            self.at(self.tracked, track=True)
        blocks = plan(i, len(self.scale), self.horizon)
        if not blocks:  # called before every block, so even to switch gradients off takes a hundredth of a token
            return
        before = self.states[blocks[0] - 1]
        if before.numel() == 1 and self.tau is None and isinstance(self.mu, float):  # decoding
            one = self.one_token
            if one is None or one.scorer is not self.scorer or one.allowed != self.allowed:
                one = self.one_token = OneToken(self.scorer, self.allowed)
            best = one(x, start, blocks, self.mu, self.costs)
            chosen = torch.tensor(walk(best, int(before)), dtype=torch.uint8)[:, None, None]
        else:
            with torch.no_grad():
                chosen = self.choose(self.scorer(self.scorer.features(x, start), blocks), before)
        self.states[blocks[0] : blocks[-1] + 1] = chosen
        if self.tracked and x.shape[1] == 1 and start and blocks[-1] == len(self.scale) - 1:
            self.follow(self.states.flatten().tolist())

    def choose(self, table, before):
        """The states of consecutive blocks: priced and chosen for every s at once (Eq 18; Eq 11 if tau is set), then looked up.

        table (B, T, g, 4, 4): q of each block, s and s'; before (B, T): states of the block before. -> (g, B, T) uint8.
        """
        q = self.priced(table)
        best = q.argmax(-1) if self.tau is None else sample(q, self.tau, self.generator)  # (B, T, g, 4)
        path = [INDEX.to(table.device)[before.long()]]
        for n in range(table.shape[2]):
            path.append(best[:, :, n].gather(2, path[-1][..., None])[..., 0])
        return STATES.to(table.device)[torch.stack(path[1:])].to(torch.uint8)

    def priced(self, table):
        """q - mu cost for (B, T, g, ..., 4); -inf for what is not allowed. ValueError before there is a price."""
        if self.mu is None:
            raise ValueError("this policy has no price yet; choose a speedup with policy.at(2.0)")
        if len(self.allowed) < 4:
            table = table.masked_fill(~torch.isin(STATES, torch.tensor(self.allowed)).to(table.device), -math.inf)
        if torch.is_tensor(self.mu):
            return table - self.mu.view(*self.mu.shape, *[1] * (table.dim() - self.mu.dim())) * self.costs
        return torch.sub(table, self.costs, alpha=self.mu)

    def save(self, path):
        """Write the policy whole or not at all, as safetensors. OSError names the path; ValueError for what `load` would refuse."""
        with refusing(path, "is left as it was: what was learned is no policy", "train with other data, or a smaller --beta or --lam"):
            self.validate()
        write_safetensors(path, self.scorer.state_dict(), scale=self.scale, costs=self.costs.tolist(), prices=self.prices,
                          horizon=self.horizon, lam=self.scorer.lam, fingerprint=self.fingerprint, settings=self.settings)

    @classmethod
    def load(cls, path):
        """Read a policy file. FileNotFoundError or ValueError names the path and the remedy."""
        tensors, meta = read_safetensors(path)
        with refusing(path, "is not a policy that we can use", "train one with python train.py"):
            L = len(meta["scale"])
            scorer = Scorer(L, len(tensors["mean"]), float(meta["lam"]), len(tensors["first.bias"]))
            scorer.load_state_dict(tensors)
            policy = cls(scorer, [float(a) for a in meta["scale"]], torch.tensor(meta["costs"]).float(), meta["fingerprint"],
                         [(float(s), float(mu)) for s, mu in meta["prices"]], int(meta["horizon"]), meta["settings"])
            policy.validate()
        return policy

    def validate(self):
        """An exception of any kind unless all numbers make sense: else the file is damaged, or training went astray."""
        L = len(self.scale)
        numbers = [*self.scale, *self.costs.tolist(), *sum(self.prices, ()), self.scorer.lam]
        numbers += torch.tensor(self.settings.get("overhead", (0.0, 0.0))).view(2).tolist()
        for name, shape in (("damage", (L, 4)), ("position_damage", (POSITIONS, L, 4))):
            if name in self.settings:
                numbers += torch.tensor(self.settings[name]).float().view(shape).flatten().tolist()
        codes = self.int4 or ""  # part of the name of a file in the cache
        sane = all(abs(number) < 1e30 for number in numbers)  # as NaN is not
        if not sane or self.costs.shape != (4,) or self.costs.min() < 0 or self.costs[3] == 0 or self.horizon < 0 or Path(codes).name != codes:
            raise ValueError("values out of range")
        targets = [s for s, _ in self.prices]
        if targets != sorted(set(targets)):
            raise ValueError("prices out of order")
        if not all(t.isfinite().all() for t in self.scorer.state_dict().values()) or not (self.scorer.std > 0).all():
            raise ValueError("a tensor has values that are not finite, or a deviation that is not positive")


# ----------------------------------------------------------------------------------------------------------
# Rewards and losses, Eq 11-17


def temperature(step, steps):
    """tau at a step of training, decaying geometrically from 1 to 0.1 (Eq 11)."""
    return 0.1 ** (step / max(1, steps - 1))


def sample(q, tau, generator):
    """s' ~ softmax(q / tau) (Eq 11): q (..., 4) -> indices (...), int64. Gumbel's trick, on the generator's device, the CPU."""
    u = torch.rand(q.shape, generator=generator).to(q.device)
    return (q / tau - (-u.clamp(min=1e-20).log()).log()).argmax(-1)


def accuracy_reward(logp_routed, logp_full):
    """R_acc of Eq 13 for text: log p_routed - log p_full of the same target, nats; shapes that broadcast."""
    return logp_routed - logp_full


def answer_reward(right):
    """R_acc of Eq 13 for classification: bool tensor -> +1.0 or -1.0."""
    return right.float() * 2 - 1


def efficiency_reward(states, costs=STATES):
    """R_eff(i) = 1 - s_i / 4 (Eq 15), any shape; with `latency_costs` the measured cost stands in for s_i."""
    return 1 - costs.to(states.device).float()[INDEX.to(states.device)[states.long()]] / 4


def block_weights(states):
    """w_i = sigmoid((S_total - S_1..i) / S_max) (Eq 14): states (L, ...) -> (L, ...).

    S_1..i is what the path has cost up to block i, S_total its whole cost, S_max = 4 L the cost of the full model.
    """
    spent = states.float().cumsum(0)
    return torch.sigmoid((spent[-1:] - spent) / (4 * len(states)))


def rewards(states, r_acc, beta, costs=STATES, weights=True):
    """R_i = w_i R_acc + beta R_eff(i) (Eq 12): states (L, ...), r_acc (...) -> (L, ...). weights False: every w_i is 1 (ablation)."""
    return (block_weights(states) if weights else 1.0) * r_acc + beta * efficiency_reward(states, costs)


def returns(R):
    """G_i = sum_{j >= i} R_j (Eq 16): (L, ...) -> (L, ...)."""
    return R.flip(0).cumsum(0).flip(0)


def policy_gradient(logp, G, baseline):
    """PG = -mean[(G_i - b) log pi(s_i)] (Eq 16), to be minimised. Shapes equal; no gradient flows through G or b."""
    return -((G - baseline).detach() * logp).mean()


def total_loss(ce, pg, alpha):
    """loss = CE + alpha PG (Eq 17). With the base model frozen CE is a constant and only PG teaches the scorer."""
    return ce + alpha * pg
