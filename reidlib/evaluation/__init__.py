"""Who may be ranked, the ranking, its scores, and how sure they are."""
