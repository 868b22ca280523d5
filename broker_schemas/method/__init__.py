"""What the model sees and writes: data set records, coordinates, payload text, prompt and images.

Shared by every role because each of them must build the same tokens from the same sample.
"""
