"""The shapes that every implementation of an op is run over."""

# (M, N, K) of a linear layer: no tokens, one, a few, many; dimensions that 16 and 128 do not divide, single ones, 538 (a
# vision MLP's 4304 split over 8 ranks), and a K long enough for accumulation to matter.
LINEAR = [
    (0, 32, 64),
    (1, 1, 1),
    (1, 64, 128),
    (3, 17, 33),
    (16, 130, 257),
    (16, 1, 300),
    (30, 40, 520),
    (67, 538, 96),
    (5, 96, 538),
    (67, 48, 1000),
    (2, 16, 4304),
]

# Rows of a batch, as (tokens before this step, tokens in this step).
BATCHES = {
    "one token": [(0, 1)],
    "prefill": [(0, 13)],
    "chunk": [(9, 6)],
    "decode": [(11, 1), (0, 1), (3, 1), (30, 1), (4, 1)],
    "mixed": [(7, 1), (0, 9), (16, 1), (12, 5), (0, 1), (3, 1), (21, 3)],
    "many": [(3 * i % 29, 1) for i in range(24)],
}

# (query heads, key heads, head dimension)
HEADS = [(2, 2, 16), (4, 2, 24), (8, 1, 32)]

# (tokens, hidden, intermediate, experts, chosen) of a mixture: odd sizes, one expert, all chosen, more experts than pairs.
EXPERTS = [
    (0, 32, 48, 4, 2),
    (1, 64, 40, 7, 3),
    (5, 33, 17, 3, 3),
    (9, 130, 72, 12, 2),
    (40, 96, 269, 5, 1),
    (70, 144, 48, 130, 8),
    (150, 64, 96, 1, 1),
]

# How tokens are sent to experts: name -> experts [T, chosen] of (tokens, experts, chosen), -1 for none.
ROUTINGS = ("random", "one expert has all", "skewed", "none", "some rows pad", "other ranks have some")

# (heads, latent, not rotated, rotated, value) of MLA: one head, odd numbers of them, latents that 128 does not divide, and
# DeepSeek's own with a rank's heads.
LATENTS = [(1, 32, 16, 8, 12), (5, 144, 24, 16, 20), (4, 512, 128, 64, 128)]

# (heads, dimension, chosen) of an indexer.
INDEXERS = [(16, 16, 6), (3, 32, 4), (8, 128, 16)]
