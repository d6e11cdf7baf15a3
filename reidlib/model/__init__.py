"""The embedding network, its weights, and images to embeddings.

network    backbone > pooling > head; the backbones by name
elsewhere  networks of timm, weights of other toolkits
weights    from a file into a network and back
device     which device, and in which precision
embed      images to embeddings, and these to files and back
depthwise  a quick gradient on the CPU; you need not read it
"""
