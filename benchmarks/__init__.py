"""Speed: ``compare`` against PyTorch's attention, and ``kernels.cpp`` without Python, over the cases of cases.csv."""
