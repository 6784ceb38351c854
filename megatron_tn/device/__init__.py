"""CUDA streams and graphs, copies to the host, host memory, threads, allocator; no other package is imported."""
