"""Trained gates: who decides to skip, learned by gradient. Three systems of the field in one policy and one training function.

For every token, before each of its blocks, a small network on the block's input x gives a logit; the block runs where the
logit is above a threshold. The base stays frozen. What differs is what a gate covers, what it sees and how it is taught:

    gate-hidden, gate-fixed, gate-mlp   skip controllers of whole blocks, all but the first and the last (arXiv 2410.20022): one
                linear layer on x, the same on a fixed input that tells it nothing of the token (zeros, which leave its bias),
                or (ours) two layers on x. In training y = x + m (block(x) - x), m = 1[logit + noise > threshold], noise logistic:
                Gumbel-Softmax with two choices.
    mindskip    attention alone, its MLP always runs; upper half of the blocks but the last (arXiv 2410.13184, by token):
                linear; m = 1[logit > threshold], and m passes its slope straight to the sigmoid: no noise, no budget.
    flexidepth  upper half of the blocks (arXiv 2503.23798): W_r W_up Norm(tanh(W_down z)), z the RMS-normed x, g = sigmoid.
                Where g > 1/2 the token runs attention, and its MLP's output is weighted by g; where not, there is no
                attention, and an adapter, an MLP 16 times narrower than the block's, is weighted by 1 - g. So g has a
                slope through what the token runs; the weights stay at inference.

    loss = KL(full || gated)                                   skip controllers, MindSkip (ours; theirs is CE)
    loss = CE + alpha * mean_t (sum_l g_l)^2                   FlexiDepth

Ours, for a budget of some hundred steps on a laptop (what was tried before is in results/NOTES.md):
    threshold   the papers add a price for every gate that is open, train at several and report what is skipped; such a price pushes all
                logits down alike. Here all are compared with one threshold instead, which follows the number of closed gates while
                training, and is set once more on training text in the end
    start       the static choice: the gates of the most similar blocks closed (`begin`), adapters at zero; FlexiDepth's start at random
    noise       a quarter of Gumbel's, or it would flip every fourth gate of such a start: p(m = 1) = sigmoid((logit - threshold) / NOISE)
    slope       a gate's m is drawn, 0 or 1; straight through, dL/dm at that end stands for the difference L(1) - L(0). But what a skip loses
                grows like a square: the slope is near 0 at m = 1 and twice the difference at m = 0. Gates would learn only while closed, and
                end half open. Skip controllers learn by ReinMax (arXiv 2304.08612): it averages both ends, each over 2 p(m), so dL/dlogit =
                dL/dm (1 - p(m)) / 2 up to a factor
    budget      from that is taken what opening all gates together would bring: the threshold sets how many are open, so a gate is to open
                only where its token deserves it more than others do (`reinmax`)
    KL          has the mean of CE's slope on text of the model's own, and less noise
    skips       are unscaled; a router's input is detached, so its gradient reaches no earlier block
    first       skip controllers run the first token of a text in full: all others attend to it, and one block that it skips costs nats
    filled      keys and values of a token that skips attention come from INT4 weights, as everywhere here (theirs: from the plain ones); in
                training all gates but FlexiDepth's run the block for every token, so there they are plain too

Training and inference are the one routed forward, `LLM.hidden`: a gate stands in the place of its block's a_i, says what a
skipped token passes on (model.skip) and weighs what comes out (model.weigh).
"""

import json
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import descend, read_safetensors, refusing, write_safetensors
from data import kl, outcomes
from policy import Policy

KINDS = ("flexidepth", "mindskip", "gate-hidden", "gate-fixed", "gate-mlp")
NARROW = 16  # how much narrower FlexiDepth's router and adapter are than the block
WIDTH = 128  # of gate-mlp's hidden layer
OPEN = 1.0  # the first bias of a gate
WINDOW = 128  # tokens of a step: many small steps beat few large ones
NOISE = 0.25  # the share of Gumbel's noise
LR, LR_MINDSKIP, LR_BIAS = 1e-3, 2e-4, 0.03  # Adam's rates: routers and adapters; MindSkip's routers; a last bias, how open a gate is
ALPHA = 1e-3  # FlexiDepth's weight of open gates, as its paper has it
PACE = 0.1  # how far the threshold rises after a step, for every gate too few that it closed


class Gate(nn.Module):
    """One block's gate: the network that decides; called as a function, what a skipped token passes on; and how its output is weighed."""

    gain = None  # (B * T, 1), or None where nothing is weighed

    def __init__(self, kind, n_embd, n_hidden):
        super().__init__()
        linear = lambda n, m: nn.Linear(n, m, bias=False)
        if kind == "flexidepth":
            narrow, hidden = max(1, n_embd // NARROW), max(1, n_hidden // NARROW)
            self.router = nn.Sequential(linear(n_embd, narrow), nn.Tanh(), nn.RMSNorm(narrow), linear(narrow, n_embd), nn.Linear(n_embd, 1))
            self.router[-1].weight.data.mul_(3)  # so that some tokens cross from the static choice, and their adapters learn
            self.adapter = nn.ModuleList([linear(n_embd, 2 * hidden), linear(hidden, n_embd)])
            nn.init.zeros_(self.adapter[1].weight)
        else:
            first, width = ([nn.Linear(n_embd, WIDTH), nn.SiLU()], WIDTH) if kind == "gate-mlp" else ([], n_embd)
            self.router = nn.Sequential(*first, nn.Linear(width, 1))
            self.adapter = nn.ModuleList()
            nn.init.zeros_(self.router[-1].weight)
        nn.init.constant_(self.router[-1].bias, OPEN)

    def forward(self, x):
        """x (n, C) of skipped tokens -> (n, C): x, or x + adapter(RMSNorm(x))."""
        if not self.adapter:
            return x
        gate, up = self.adapter[0](normed(x)).chunk(2, dim=-1)
        return x + self.adapter[1](F.silu(gate) * up).to(x.dtype)


def normed(x):
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)  # the gain of the model's own norm is one with the first layer's weights


class Router:
    """A policy of trained gates; states are 4 and 0. kind: one of `KINDS`; the rest as `Policy`.

    controls: whether it is a skip controller. rows: rows of `states` a block, 2 for FlexiDepth and MindSkip, where attention has states of
    its own. routed: the blocks that have a gate. threshold: of the logits. generator: None, or in training what its noise comes from. seen:
    of the last call, the logits of each gate, (B, T); on: in training its m, a leaf that gets dL/dm (FlexiDepth has none). extra: see
    `bit_costs`.
    """

    def __init__(self, kind, n_layer, n_embd, n_hidden, fingerprint="", settings=None):
        L = n_layer
        self.kind = kind
        self.fingerprint = fingerprint
        self.settings = settings or {}
        self.size = (n_layer, n_embd, n_hidden)
        self.controls = kind.startswith("gate-")
        self.rows = 1 if self.controls else 2
        self.routed = {"flexidepth": range(L // 2, L), "mindskip": range(L - 1 - L // 2, L - 1)}.get(kind, range(1, L - 1))
        self.gates = nn.ModuleList(Gate(kind, n_embd, n_hidden) for _ in self.routed).requires_grad_(False)
        self.scale = [1.0] * (self.rows * L)
        for block, gate in zip(self.routed, self.gates):
            self.scale[self.rows * block + (1 if kind == "flexidepth" else 0)] = gate  # FlexiDepth weighs and replaces the MLP
        self.int4 = None
        self.kv = "fill"
        self.states = None
        self.threshold = 0.0
        self.generator = None
        count = lambda module: sum(p.numel() for p in module.parameters())
        routers = 0 if kind == "gate-fixed" else sum(count(gate.router) for gate in self.gates)  # fixed: known beforehand
        self.extra = (routers, count(self.gates[0].adapter))

    def to(self, device):
        self.gates.to(device)
        return self

    check = Policy.check

    def decide(self, i, x, start):
        block, mlp = divmod(i, self.rows)
        if i == 0:
            self.seen, self.on = [], []
        if block not in self.routed:
            return
        if mlp:  # FlexiDepth's follows its attention, MindSkip's always runs
            if self.kind == "flexidepth":
                self.states[i] = self.states[i - 1]
            return
        gate = self.gates[block - self.routed[0]]
        training = self.generator is not None
        shown = torch.zeros_like(x, dtype=torch.float32) if self.kind == "gate-fixed" else normed(x.detach())
        logit = gate.router(shown)[..., 0]  # (B, T)
        self.seen.append(logit)
        run = logit > self.threshold
        gain = None
        if self.controls:
            if training:
                run = torch.rand(run.shape, generator=self.generator).to(run.device) < ((logit - self.threshold) / NOISE).sigmoid()
            if start == 0:
                run[:, 0] = True
        if self.kind == "flexidepth":
            g = (logit - self.threshold).sigmoid()
            gain = torch.where(run, g, 1 - g)
        elif training:
            gain = run.float().requires_grad_()
            self.on.append(gain)
            run = torch.ones_like(run)  # both paths: the slope of m needs block(x) - x
        self.states[i] = run * 4
        gate.gain = None if gain is None else gain.reshape(-1, 1)

    def free(self, example):
        """(R, T) bool: the tokens of a data.Example for which gates decide."""
        keep = example.keep()
        if self.controls:
            keep[:, 0] = False
        return keep

    def save(self, path):
        """Write the gates whole or not at all, as safetensors. OSError names the path; ValueError for what `load` would refuse."""
        with refusing(path, "is left as it was: what was learned are no gates", "train with other data or fewer --steps"):
            self.validate()
        write_safetensors(path, self.gates.state_dict(), router=self.kind, size=self.size, threshold=self.threshold,
                          fingerprint=self.fingerprint, settings=self.settings)

    def validate(self):
        """ValueError unless all numbers are finite: else the file is damaged, or training went astray."""
        if not math.isfinite(self.threshold) or not all(t.isfinite().all() for t in self.gates.state_dict().values()):
            raise ValueError("a value is not finite")


def load(path):
    """Read what `Router.save` wrote -> Router. FileNotFoundError or ValueError names the path and the remedy."""
    tensors, meta = read_safetensors(path)
    with refusing(path, "holds no gates that we can use", "train them with train.py --objective flexidepth"):
        kind = meta["router"]
        size = [int(n) for n in meta["size"]]
        if kind not in KINDS or not all(1 <= n < 2**18 for n in size) or not 4 <= size[0] <= 1000:
            raise ValueError("values out of range")
        with torch.device("meta"):
            policy = Router(kind, *size, meta["fingerprint"], meta["settings"])
        policy.gates.load_state_dict({k: t.float() for k, t in tensors.items()}, assign=True)
        policy.threshold = float(meta["threshold"])
        if not all(type(policy.settings[key]) is wanted for key, wanted in (("skip", int), ("steps", int), ("data", str))):
            raise ValueError("settings of the wrong kind")
        policy.validate()
    return policy


def begin(policy, known, skip):
    """Close the gates of the `skip` blocks, of those that have a gate, whose input and output are most similar (MindSkip: of attention)."""
    similarity = (known.sublayers[::2] if policy.kind == "mindskip" else known.similarity).mean(1)[list(policy.routed)]
    for n in similarity.topk(skip).indices.tolist():
        policy.gates[n].router[-1].bias.data.fill_(-OPEN)


@torch.no_grad()
def straight_through(by_m, over):
    """dL/dlogit from dL/dm, `by_m`, for `over`, the logits less the threshold: all of every gate and token, (gates, tokens)."""
    g = over.sigmoid()
    return by_m * g * (1 - g)


@torch.no_grad()
def reinmax(by_m, over, m):
    """dL/d(logit / NOISE) from dL/dm at the m that was drawn, by the mean of both ends, less what moving all gates together, as the
    threshold does, would bring: it sums to zero. Shapes as above."""
    opened, closed = (over / NOISE).sigmoid(), (-over / NOISE).sigmoid()  # p(m = 1), p(m = 0)
    slope = by_m * torch.where(m > 0, closed, opened) / 2  # p(1) p(0) dL/dm / (2 p(m))
    moves = opened * closed
    return slope - moves * slope.sum() / moves.sum().clamp(min=1e-12)


def train_gates(policy, model, examples, skip, steps, checkpoint, log):
    """Train policy.gates in place on examples (data.Example) until about `skip` gates a token are closed. Resumes from `checkpoint`.

    log: a file that gets a line a step: "ce" and "loss" nats, "skipped" gates a token, "threshold".
    """
    generator = policy.generator = torch.Generator().manual_seed(checkpoint.seed)
    parameters = dict(policy.gates.requires_grad_().named_parameters())
    flexidepth = policy.kind == "flexidepth"
    rates = [LR_BIAS if p.numel() == 1 else LR_MINDSKIP if policy.kind == "mindskip" else LR for p in parameters.values()]
    optimizer = torch.optim.Adam([{"params": [p]} for p in parameters.values()])
    policy.threshold = checkpoint.meta.get("threshold", 0.0)
    for step, bar in checkpoint.steps("gates", steps, 10, parameters, optimizer, generator, lambda: {"threshold": policy.threshold}):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * min(1.0, (steps - step) / (0.3 * steps))
        example = examples[int(torch.randint(len(examples), (1,), generator=generator))]
        logp, right = outcomes(model, model.hidden(example.rows, policy), example)
        ce = F.nll_loss(logp, right)
        keep = policy.free(example)
        over = torch.stack(policy.seen)[:, keep] - policy.threshold  # (gates, tokens)
        if flexidepth:
            loss = ce + ALPHA * over.sigmoid().sum(0).square().mean()
            closed = (over <= 0).float()
            descend(loss, optimizer, parameters.values())
        else:
            with torch.no_grad():
                full = outcomes(model, model.hidden(example.rows), example)[0]
            loss = kl(full, logp).mean()
            m = torch.stack(policy.on)[:, keep]
            by_m = torch.stack(torch.autograd.grad(loss, policy.on))[:, keep]
            closed = 1 - m
            by_logit = straight_through(by_m, over) if policy.kind == "mindskip" else reinmax(by_m, over, m)
            descend((by_logit * over).sum(), optimizer, parameters.values())  # a loss whose gradient by each logit is by_logit
        line = {"step": step, "ce": ce.item(), "loss": loss.item(), "skipped": closed.sum(0).mean().item(), "threshold": policy.threshold}
        policy.threshold += PACE * (skip - line["skipped"])
        log.write(json.dumps(line) + "\n")
        bar.set_postfix(ce=f"{line['ce']:.3f}", skipped=f"{line['skipped']:.2f}")
    policy.gates.requires_grad_(False)
    policy.generator = None


@torch.no_grad()
def calibrate(policy, model, examples, skip):
    """Set the threshold at which `skip` gates a token (that has a choice) are closed on examples. What earlier gates close changes what
    later ones see, so the threshold is found in rounds: each goes halfway to the right one for the logits that the round before it gave
    rise to."""
    for n in range(4):
        logits = []
        for example in tqdm(examples, desc="threshold", leave=False):
            model.hidden(example.rows, policy)
            logits.append(torch.stack(policy.seen)[:, policy.free(example)])
        logits = torch.cat(logits, 1)
        k = min(max(1, round(skip * logits.shape[1])), logits.numel() - 1)
        low, high = logits.flatten().sort().values[k - 1 : k + 1].tolist()
        policy.threshold = (low + high) / 2 if n == 0 else (policy.threshold + (low + high) / 2) / 2
