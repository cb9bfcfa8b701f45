"""The frontier of families: quality against bytes for members of one architecture, of this package and of its peers.

    python -m benchmarks.frontier --family vit --csv vit.csv --plot vit.png

families   what is compressed, each made from a recipe and a seed
scene      what a method may look at: weights, and second moments of inputs on calibration data
peers      methods from the literature: pure functions of each paper, and a declaration of what is swept
packing    what a method leaves, as one file
ours       this package, through its public functions
measure    output errors and scores
table      the best setting of each method at each size, chosen on validation data and measured once on test data
"""
