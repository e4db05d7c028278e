"""One page of runs, which opens from disk, in any browser, without a network.

categories.py   predictions of a run, and what is told of every discovered category
inference.py    some of its images through the model: confidences, class tokens, what a category is near
sprites.py      a gallery's thumbnails as one picture, as large as the page may be
curves.py       losses, accuracies and classes in use over the steps
confusion.py    old and new classes after matching
embedding.py    the images as a map: t-SNE of their class tokens
prompts.py      the learned prompts as pictures
history.py      what a run was: configuration, data, revision, machines, time
text.py         what a dataset says of itself, made harmless to look at
subject.py      what is known of the runs, and of what the last of them discovered
page.py         all of it in one file (page.html.j2, page.css, page.js); begin here
"""
