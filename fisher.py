"""Fisher labels: what damage each (token, block, state) does, and a scorer that learns to foresee it. `train.py --objective fisher`.

Ours, where the paper has a policy gradient. Put a gate theta = 0 on every (block, token, state): each product computes x W + theta stop(x (W_s -
W)), so that theta = 1 would run that token's block in state s; the gate of a skip moves the block's output towards a_i times its input, and
its keys and values towards INT4. Draw a target from the model's own distribution at every position; the label is half the square of d
log p(sequence) / d theta, averaged over draws. That is the second-order estimate of the KL divergence which this one choice adds over *all*
later tokens, damage to keys and values included. In the words of the MDP it is -R_acc of Eq 13 summed over the whole episode, with every
other decision at state 4: a value, where the paper samples returns.

Of a multiple-choice item it is the KL of the answers' probabilities. The question opens the row of every answer and runs in the same states
in all of them, one choice, so there the slopes of the rows are added before they are squared.

    fisher_labels   one forward pass of the full model, and for each draw one backward pass to all gates at once
    fit             the scorer (policy.Scorer, Eq 8-10) learns their expectation from the hidden state
    learn           both; the labels of skips are held to what baselines.sensitivities measures
"""

import json

import torch
import torch.nn.functional as F
from tqdm import tqdm

from baselines import sensitivities
from common import descend, write_whole
from data import outcomes
from policy import POSITIONS, plan, position_bucket

SHARE = 0.1  # of a label: what every token has of the mean of its block and state


# ----------------------------------------------------------------------------------------------------------
# Labels


class Gates(torch.autograd.Function):
    """y + sum_s g_s change_s at g = 0: forward gives y itself, backward dL/dg_s of every token, the dot product of dL/dy with change_s.

    y (n, N); gates g (3, n) for skip, INT4, INT8; changes: three of (n, N), or (n, M) for the last M columns of y alone, or None for no change.
    """

    @staticmethod
    def forward(ctx, y, gates, *changes):
        ctx.changes = changes
        return y.view_as(y)

    @staticmethod
    def backward(ctx, slope):
        dots = [slope.new_zeros(len(slope)) if c is None else torch.linalg.vecdot(slope[:, -c.shape[1] :], c) for c in ctx.changes]
        return slope, torch.stack(dots), None, None, None


def gated(linear, gates):
    """What stands in for a layer: x -> x W^T with gates (3, n) towards its other states: skip, INT4, INT8."""

    def product(x):
        y = F.linear(x, linear.weight)
        with torch.no_grad():
            int4, int8 = linear.low[1](x) - y, linear.low[2](x) - y
        fill = None if linear.fill_from is None else int4[:, linear.fill_from :]  # a skipped token's keys and values are in INT4
        return Gates.apply(y, gates, fill, int4, int8)

    return product


def drawn_slope(model, hidden, example, generator):
    """A random slope by the last hidden states (R, T, C), detached -> (R, T, C). In the mean the square of what follows from it is that of
    d log p(target) / d hidden for targets of the model's own distribution.

    Text: draws a token at every position, so the slope is the drawn row of the head minus the expected row. Multiple choice: the sum over
    the answers, each by the root of its probability and a random sign; one drawn answer says far less, as an unlikely one has the slope.
    """
    if example.choices is None:
        p = model.head(hidden[0]).softmax(-1)
        expected, p = p @ model.head.weight, p.cumsum(-1)
        # through the distribution function: torch.multinomial takes ten times as long
        u = torch.rand(len(p), 1, generator=generator).to(p.device) * p[:, -1:]
        return (model.head.weight[torch.searchsorted(p, u)[:, 0].clamp(max=p.shape[1] - 1)] - expected)[None]
    logp = outcomes(model, hidden.requires_grad_(), example)[0][0]
    signs = 2 * torch.randint(2, logp.shape, generator=generator) - 1
    return torch.autograd.grad(logp, hidden, signs.to(logp) * (logp.detach() / 2).exp())[0]


def fisher_labels(model, example, scale, generator):
    """Half the squared derivative of log p(targets) by every gate, for one draw of the targets; and every block's input.

    Example with N tokens -> (N, L - 1, 3): blocks 2..L by skip, INT4, INT8; nats, each the harm done to all that the example
    predicts; and [(R, T, C)]. scale: a_i of every block; generator: of the draw.
    """
    R, T = example.rows.shape
    L = len(model.blocks)
    x = model.embed(example.rows).flatten(0, 1)
    rope = model.rope(0, T)
    gates = [torch.zeros(3, R * T, device=x.device, requires_grad=True) for _ in range(L)]
    inputs = []
    for i, (block, gate) in enumerate(zip(model.blocks, gates)):
        inputs.append(x.detach().view(R, T, -1))
        if i == 0:
            x = block(x, R, [(4, None)], 1.0, rope)
            continue
        for linear in block.linears().values():
            linear.low["gate"] = gated(linear, gate)
        y = block(x, R, [("gate", None)], 1.0, rope)
        x = y if i == L - 1 else Gates.apply(y, gate, (scale[i] * x - y).detach(), None, None)
        for linear in block.linears().values():
            del linear.low["gate"]
    hidden = model.norm(x).view(R, T, -1)
    slopes = torch.autograd.grad(hidden, gates[1:], drawn_slope(model, hidden.detach(), example, generator))
    # where rows begin alike they run in the same states: one choice, whose damage is shared among them
    alike = (example.rows[:, None] == example.rows).cumprod(-1).to(x.dtype)  # (R, R, T)
    slopes = torch.einsum("bsqt,rqt->bsrt", torch.stack(slopes).view(L - 1, 3, R, T), alike) / alike.sum(1).sqrt()
    return (slopes.square() / 2)[..., example.keep()].permute(2, 0, 1), inputs


def gather_labels(model, examples, scorer, scale, horizon, checkpoint):
    """What the scorer learns from: labels (N, L - 1, 3), its inputs {block that plans: features (N, d + 2) bf16}, positions (N,),
    and the mean label for INT4 and INT8 of the example that a token is in (N,).

    Saved every few examples; every example draws from its own generator, so a resumed run draws the same.
    """
    L = len(model.blocks)
    device = examples[0].rows.device
    plans = [i for i in range(L) if plan(i, L, horizon)]
    done = checkpoint.meta["step"]
    parts = [{k: t.to(device) for k, t in checkpoint.tensors.items()}] if done else []
    saved = 0
    for n in tqdm(range(done, len(examples)), desc="fisher labels", initial=done, total=len(examples)):
        generator = torch.Generator().manual_seed(checkpoint.seed * 1000003 + n)
        keep = examples[n].keep()
        labels, inputs = fisher_labels(model, examples[n], scale, generator)
        position = torch.arange(keep.shape[1], device=device).expand_as(keep)[keep]
        part = {f"input.{i}": scorer.features(inputs[i], 0)[keep].bfloat16() for i in plans} | {"labels": labels, "position": position}
        part["size"] = labels[..., 1:].mean().expand(len(labels))
        parts.append(part)
        saved += len(labels)
        if saved >= 4096 or n + 1 == len(examples):
            parts = [{k: torch.cat([p[k] for p in parts]) for k in part}]
            saved = 0
            checkpoint.write(n + 1, parts[0])
    [found] = parts
    return found["labels"], {i: found[f"input.{i}"] for i in plans}, found["position"], found["size"]


# ----------------------------------------------------------------------------------------------------------
# A scorer that predicts them


def fit(scorer, labels, inputs, horizon, seed, epochs=8):
    """Fit log damage to labels (N, L - 1, 3) from inputs {block: (N, d + 2)}: the loss r + y exp(-r) is least where exp(r) is E[y].

    y: label over the mean of its block and state, cut at 50; r: predicted log damage minus that mean's logarithm; weighted by the root of
    the mean, and so that the three states count alike: a skip's mean is a hundred times INT4's. The scorer, trained in place, starts at the
    means: its bias is set to their logarithm. Returns the means (L - 1, 3), nats, and a list of {epoch, loss}.
    """
    L = len(scorer.bias)
    N = len(labels)
    mean = labels.mean(0).clamp(min=1e-12)  # (L - 1, 3)
    y = (labels / mean).clamp(max=50)
    weight = mean.sqrt() / mean.sqrt().sum(0) / 3
    weight[-1, 0] = 0.0  # the last block is never skipped
    with torch.no_grad():
        scorer.bias[1:, :, :3] = mean.log()[:, None]
    batch = 64
    lr = 3e-3
    optimizer = torch.optim.AdamW(scorer.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (N // batch or 1)
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
                these = slice(blocks[0] - 1, blocks[-1])  # their rows in labels, which leave block 1 out
                found = scorer.log_damage(f[rows, None].float(), *scorer.of_blocks(blocks)[:3])  # (n, 1, g, s, s')
                r = found[:, 0, :, :, :3].mean(2) - mean[these].log()  # (n, g, 3); labels do not know s
                loss = loss + ((r + y[rows, these] * (-r).exp()) * weight[these]).sum((1, 2)).mean()
            descend(loss, optimizer, scorer.parameters())
            schedule.step()
            losses.append(loss.item())
        log.append({"epoch": epoch, "loss": sum(losses) / len(losses)})
    scorer.eval()
    return mean, log


def learn(scorer, model, examples, few, scale, horizon, checkpoint, log_path):
    """Labels, then fit. Returns the mean damage (L, 4) and the damage by position (POSITIONS, L, 4): at t = 0, 1, 2-3, 4-7, ...

    few: examples that the damage of skips is measured on. The log, a line an epoch, goes to log_path.
    """
    labels, inputs, position, size = gather_labels(model, examples, scorer, scale, horizon, checkpoint)
    if few[0].choices:  # where two answers are close all labels are large, which no token can tell: items count alike, or a few outweigh all
        labels *= (size.mean() / size.clamp(min=1e-20))[:, None, None]
    # A skip is too large a change for a second-order estimate: hold its mean, block by block, to the measured KL. And where a token is all
    # but certain there is no slope, and yet a change, or many small ones at once, can do great damage: so every token's label has a share of
    # the mean.
    drawn = labels.mean(0).clamp(min=1e-12)
    held = drawn.clone()
    held[:, 0] = sensitivities(model, few, scale, states=[0])[1:, 0]
    labels = held * (SHARE + (1 - SHARE) * labels / drawn)
    mean, log = fit(scorer, labels, inputs, horizon, checkpoint.seed)
    write_whole(log_path, "".join(json.dumps(line) + "\n" for line in log).encode())
    table = mean.repeat(POSITIONS, 1, 1)
    where = position_bucket(position)
    for p in where.unique():
        table[p] = labels[where == p].mean(0)
    pad = lambda t: F.pad(t, (0, 1, 1, 0)).cpu()  # a column for state 4 and a row for block 1: no damage
    return pad(mean), pad(table)
