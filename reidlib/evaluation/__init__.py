"""Who may be ranked, the ranking, its scores, and how sure they are.

distances  between embeddings, in float64: of pairs, by a product with its rounding, nearest
metrics    from the ranks of matches to AP by both definitions, CMC and mINP
ranks      at which rank each match stands: the engine
sides      query and gallery as arrays, checked
retrieval  the protocol: who may be ranked; scores and ranked lists
intervals  bootstrap, and the paired comparison of two rows
baselines  what needs no training
rerank     re-ranking, query expansion, unit length
verify     the same person or not?
scoring    a run is opened, scored and written
"""
