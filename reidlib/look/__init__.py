"""All that a person looks at.

figures        curves, bars, histograms; how a figure reaches a notebook or a file
live           a training seen while it runs
photographs    photo grids, ranked lists, a map of embeddings, what a network looks at
search         who in these pictures looks like this person?
suspects       copies of a photograph, and labels that may be wrong
why            what queries that fail have in common; what made two images look alike
pages          what the HTML pages below are filled with
embedding_map  a map of embeddings as a page
lists          ranked lists as data, for the browser
browser        the ranked-list browser, as a page and in a notebook
board          what TensorBoard shows of a run
"""
