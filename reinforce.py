"""The paper's learning: sampled states, rewards, policy gradient. `train.py --objective rl`, and `--train-model`.

    (11)  every decision is sampled from softmax((q - mu cost) / tau), tau falling                `Rollout`
    (13)  R_acc of each token of several rollouts of the same example                             `reward_of`
    (16)  PG with the mean return of the other rollouts as baseline                               `leave_one_out`, `policy_gradient_steps`
    (17)  loss = CE + alpha PG: with the base frozen CE gives the scorer no gradient, so the two   `train_base`
          are taken one after the other: first PG trains the scorer, then, on request, CE the base

Rewards, returns and losses themselves (Eq 12-17) are in policy.py. Ours, without which the scorer does not learn at all in the steps
that a laptop has: it starts from measured sensitivities (or from another policy), explores in units of typical damage, divides each
block's advantages by their spread, and moves the price so that the sampled cost stays at the target.
"""

import json

import torch
import torch.nn.functional as F

from baselines import sensitivities
from common import descend, write_safetensors
from data import outcomes
from policy import (INDEX, STATES, Policy, accuracy_reward, answer_reward, goal_cost, mean_cost, plan, policy_gradient, returns, rewards,
                    static_plan, temperature, total_loss)

BATCH, ROLLOUTS = 2, 4  # examples a step, sampled runs of each
LR, ALPHA, LAM = 5e-4, 1.0, 0.0001  # Adam's rate; alpha of Eq 17; lam of Eq 8


class Rollout(Policy):
    """A policy that samples (Eq 11) and keeps what the scorer saw, so that log pi can be computed with a gradient."""

    def decide(self, i, x, start):
        if i == 0:
            self.seen = {}  # {block that decides: features} of this call
        if plan(i, len(self.scale), self.horizon):
            self.seen[i] = self.scorer.features(x, start)
        super().decide(i, x, start)

    def log_pi(self):
        """log pi(s_i) of every decision of the last call, blocks 2..L: (L - 1, B, T), differentiable."""
        index = INDEX.to(self.states.device)[self.states.long()]
        L = len(self.scale)
        q = torch.cat([self.priced(self.scorer(features, plan(i, L, self.horizon))) for i, features in self.seen.items()], 2)
        logp = (q / self.tau).log_softmax(-1).flatten(-2)  # (B, T, L - 1, 16): s, then s'
        chosen = (4 * index[:-1] + index[1:]).permute(1, 2, 0)[..., None]
        return logp.gather(3, chosen)[..., 0].permute(2, 0, 1)


def leave_one_out(G):
    """The baseline b of Eq 16: the mean G of the other rollouts of the same example. G (L, rollouts, ...)."""
    return (G.sum(1, keepdim=True) - G) / (G.shape[1] - 1)


def reward_of(model, example, policy):
    """R_acc of Eq 13 for ROLLOUTS sampled runs of an example, under a `Rollout` with tau and generator set.

    Returns R_acc (rollouts, tokens), the states (L, rollouts, tokens) that made it, and a function that takes (L, rollouts * R, T) to
    those tokens. Text: log p_routed - log p_full of the token that follows, nats; the last token has none. Multiple choice: +-1 for
    all tokens.
    """
    R = len(example.rows)
    keep = example.keep()
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


def policy_gradient_steps(policy, model, examples, beta, unit, steps, target_cost, checkpoint, log):
    """REINFORCE on examples; trains the scorer of a `Rollout` in place. Resumes from `checkpoint` when it has a step.

    beta: of Eq 12; target_cost: mean cost of a block, in the units of policy.costs; log: an open file, a JSON line a step; unit: what a
    difference of 1 in q / tau is worth at the start, in nats, so that exploration has the scale of the damage.
    """
    generator = torch.Generator().manual_seed(checkpoint.seed)
    optimizer = torch.optim.Adam(policy.scorer.parameters(), LR)
    parameters = dict(policy.scorer.named_parameters())
    policy.mu = checkpoint.meta.get("mu", policy.mu)
    policy.generator = generator
    costed = STATES if policy.settings["cost"] == "bits" else policy.costs  # Eq 15 counts states; by the clock it is what they take
    for step, bar in checkpoint.steps("policy gradient", steps, 5, parameters, optimizer, generator, lambda: {"mu": policy.mu}):
        policy.tau = unit * temperature(step, steps)
        losses, gained, costs = [], [], []
        optimizer.zero_grad()
        for n in torch.randperm(len(examples), generator=generator)[:BATCH].tolist():
            r_acc, states, of_tokens = reward_of(model, examples[n], policy)
            G = returns(rewards(states, r_acc, beta, costed, policy.settings["weights"]))[1:]
            b = leave_one_out(G)
            spread = (G - b).flatten(1).std(dim=1)[:, None, None] + 1e-6  # ours: each block's advantages in units of their spread
            loss = total_loss(0.0, policy_gradient(of_tokens(policy.log_pi()), G / spread, b / spread), ALPHA) / BATCH
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


def learn(scorer, model, examples, few, scale, costs, start, checkpoint, log_path, settings):
    """The policy gradient, from measured sensitivities or, unless it is None, from the policy `start`. Trains scorer in place.

    few: examples that sensitivities are measured on; costs (4,); settings: those of train.py; a log line a step goes to log_path.
    Returns the measured damage (L, 4), nats.
    """
    damage = sensitivities(model, few, scale)
    goal = goal_cost(settings["speedup"], len(scale), settings["overhead"])
    mu, _ = static_plan(damage, costs, goal)
    if start:
        scorer.load_state_dict(start.scorer.state_dict())
        mu = start.mu
    else:
        scorer.bias.data[1:, :, :3] = damage[1:, None, :3].clamp(min=1e-12).log().to(scorer.bias.device)
    rollout = Rollout(scorer, scale, costs, settings["fingerprint"], horizon=settings["horizon"], settings=settings).to(scorer.bias.device)
    rollout.mu = mu
    unit = float((damage[1:, 1] - damage[1:, 2]).abs().median().clamp(min=1e-9))
    beta = 4 * mu if settings["beta"] is None else settings["beta"]
    with checkpoint.log(log_path) as log:
        policy_gradient_steps(rollout, model, examples, beta, unit, settings["steps"], goal, checkpoint, log)
    return damage


# ----------------------------------------------------------------------------------------------------------
# --train-model: the base learns to bear its states (Eq 17)


def straight(linear, low):
    """What stands in for a layer's rounded weight while the base is trained: a product with the weight plus its rounding error, held
    fixed, so that the gradient passes straight through the rounding (Bengio et al. 2013) to the weight."""
    N = len(low.weight)  # "fill" has k and v alone, the last rows
    error = low.weight - linear.weight.detach()[-N:]
    return lambda x: F.linear(x, linear.weight[-N:] + error)


def train_base(model, policy, examples, steps, checkpoint, lr=1e-5):
    """Minimise CE of the routed model over its blocks' weights, the policy choosing states as at inference (Eq 17; the scorer was taught
    before, by PG or by Fisher labels). Changes the model in place and takes its rounded weights away; call `quantize` again."""
    linears = model.linears()
    for linear in linears.values():
        linear.low = {s: straight(linear, low) for s, low in linear.low.items()}
    weights = {name: linear.weight.requires_grad_() for name, linear in linears.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(checkpoint.seed)
    for _, bar in checkpoint.steps("train the base", steps, 10, weights, optimizer, generator):
        example = examples[int(torch.randint(len(examples), (1,), generator=generator))]
        logp, right = outcomes(model, model.hidden(example.rows, policy), example)
        loss = total_loss(F.nll_loss(logp, right), 0.0, ALPHA)
        descend(loss, optimizer, weights.values())
        bar.set_postfix(ce=f"{loss.item():.3f}")
    for linear in linears.values():
        linear.weight.requires_grad_(False).copy_(linear.weight.bfloat16())  # as it will be saved
        linear.low = {}
    model.quantized = False


def save_base(model, path):
    """The trained weights in bf16, with the name of the model that was there before any training: `--model out/model.safetensors` loads both."""
    tensors = {k: t.bfloat16() for k, t in model.state_dict().items() if not (model.config.tied and k == "head.weight")}
    write_safetensors(path, tensors, base=model.base)
