"""The only layer that touches the world: sockets, files, processes, threads, clocks and the terminal."""
