"""A data set becomes tables; tables become pixels; pixels become batches."""
