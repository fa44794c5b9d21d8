"""The compared methods as policies: each says in which state every token runs every block, one routed forward runs them all.

A method is a function of the speedup it is asked for (in bits) that returns what `LLM.forward` takes as a policy, or, where
the states depend on the tokens' number, a function of the tokens (B, T) that returns one. All keep the first block in
state 4 and never skip the last. A skipped block returns its input unscaled and fills keys and values in INT4, as DASH does.

    full, int8, int4   every block as loaded, in INT8, in INT4 (the speedup asked for is ignored; theirs is reported)
    static_skip        the blocks whose input and output are most similar, skipped for every token (ShortGPT, arXiv
                       2403.03853; the paper's "naive static skipping")
    random_skip        each block skipped at random, token by token (the paper's Random Skip)
    random_mix         each block in INT4 or INT8 at random, token by token, at the cost asked for
    static_mix         one state a block for all tokens, the best by the policy's mean labels (its file keeps them)
"""

import torch

from policy import Fixed, random_states, static_plan


def full(L, speedup, costs, similarity, seed):
    return Fixed([4] * L)


def int8(L, speedup, costs, similarity, seed):
    return Fixed([4] + [2] * (L - 1))


def int4(L, speedup, costs, similarity, seed):
    return Fixed([4] + [1] * (L - 1))


def skips(L, speedup, costs):
    """How many of the blocks between first and last must be skipped for a speedup in bits, a float."""
    number = L * (4 - 4 / speedup) / (4 - float(costs[0]))
    if not 0 <= number <= L - 2:
        raise ValueError(f"speedup {speedup:g} is out of reach by skipping: give 1 to {L / (L - (L - 2) * (1 - float(costs[0]) / 4)):.2f}")
    return number


def static_skip(L, speedup, costs, similarity, seed):
    number = -int(-skips(L, speedup, costs) // 1)  # at least the speedup asked for
    order = similarity[1:-1].argsort(descending=True) + 1
    states = torch.full((L,), 4)
    states[order[:number]] = 0
    return Fixed(states)


def random_skip(L, speedup, costs, similarity, seed):
    share, generator = skips(L, speedup, costs) / (L - 2), torch.Generator().manual_seed(seed)

    def draw(tokens):
        states = torch.where(torch.rand(L, *tokens.shape, generator=generator) < share, 0, 4)
        states[0], states[-1] = 4, 4
        return Fixed(states)

    return draw


def random_mix(L, speedup, costs, similarity, seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda tokens: Fixed(random_states((L, *tokens.shape), 4 / speedup, costs, generator))


def static_mix(L, speedup, costs, damage, seed):
    return Fixed(static_plan(damage, costs, 4 / speedup)[1])
