"""Options and files of options, right and wrong: a command does it or says in one line why not."""
