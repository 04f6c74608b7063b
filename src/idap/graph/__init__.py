"""From a module to a graph of plain data: nodes, shapes, owners, source lines and where each size came from."""
