"""The whole journey: from two folders of images to a page of what was discovered, by commands that stand alone already.

OUT/discover.json     what was asked for; another question is refused
OUT/plan.json         precision and size of stored images, chosen at the first start; then epochs, image size, memory
OUT/shards/           sptnet-shards discover
OUT/features/         sptnet features: class tokens of the backbone as it comes
OUT/estimate_k/       sptnet estimate-k, unless the number of classes was said
OUT/measured.json     seconds of a few steps on this machine
OUT/simgcd.yaml       what differs from configs/photographs_simgcd.yaml, for `sptnet train`
OUT/continued.yaml    the same of the second stage, or sptnet.yaml
OUT/simgcd/, continued/ or sptnet/    the two runs
OUT/checks/           sptnet predict of both on the labelled images, for the comparison
OUT/sorted/           sptnet predict: a row for every image of UNLABELLED
OUT/page.html         sptnet report --html
OUT/sizes.csv         how large every category is
OUT/discover.lock     held by whoever works here

`journey.py` is the order; `request.py` what was asked, `stages.py` the commands, `children.py` how one is run and
stopped, `pipeline.py` how far one is, `choices.py` what is chosen once, `planning.py` and `plan.py` (pure) how long
each stage trains, `measure.py` what a step costs, `free_memory.py` within what memory, `recipe.py` the two
configurations, `saved_state.py` the JSON files, `diagnostics.py` and `closing.py` what is said at the end.
"""
