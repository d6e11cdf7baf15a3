"""Notebooks run headless, variants compared, models given away.

notebooks  which there are, their parameters, and chains of them
headless   one notebook in a kernel of its own
compare    variants, each trained and scored where it is not there yet
scores     the scores of runs in one table
release    weights in half precision, their scores, a model card
export     a network as one ONNX file
"""
