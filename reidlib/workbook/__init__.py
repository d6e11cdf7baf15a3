"""Notebooks run headless, variants compared, models given away."""
