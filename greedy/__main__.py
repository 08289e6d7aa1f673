"""``python -m greedy``, as ``torchrun -m greedy`` starts it: the command line."""

from greedy.cli.main import main

if __name__ == "__main__":
    main()
