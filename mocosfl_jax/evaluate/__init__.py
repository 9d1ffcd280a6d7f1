"""The evaluation protocols as a command, on any run and on any labelled data set."""
