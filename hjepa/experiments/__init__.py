"""What is run over grids and whole: notebooks with parameters, sweeps, the tour."""
