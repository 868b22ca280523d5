"""One module for each group of commands of the program."""

from rollstream.wiring.package_paths import prefer_ours

# before the first of our packages is imported: another project's would be taken for it
prefer_ours()
