"""The parts of Pascal-Part-116 as groups of PASCAL-Part's parts, for `evaluate --merge pascal-part-116`.

Source: the label list of Pascal-Part-116 in OV-PARTS (Wei et al., "OV-PARTS: Towards Open-Vocabulary Part
Segmentation", NeurIPS 2023 Datasets and Benchmarks): 116 parts such as "horse's leg", of the 16 classes of PASCAL-Part
that have parts. It collapses left and right, front and back, and upper and lower legs. Which of PASCAL-Part's parts
belong to which of them follows from the names.
"""

Groups = dict[str, tuple[str, ...]]

_WHEELS: Groups = {"wheel": ("fwheel", "bwheel")}
_EYES: Groups = {"eye": ("leye", "reye")}
_EARS: Groups = {"ear": ("lear", "rear")}
_HORNS: Groups = {"horn": ("lhorn", "rhorn")}
_WINGS: Groups = {"wing": ("lwing", "rwing")}
_UPPER_AND_LOWER_LEGS: Groups = {
    "leg": ("lfuleg", "lflleg", "rfuleg", "rflleg", "lbuleg", "lblleg", "rbuleg", "rblleg"),
}
_LEGS_AND_PAWS: Groups = {"leg": ("lfleg", "rfleg", "lbleg", "rbleg"), "paw": ("lfpa", "rfpa", "lbpa", "rbpa")}
_VEHICLE: Groups = {
    "front": ("frontside",),
    "side": ("leftside", "rightside"),
    "back": ("backside",),
    "roof": ("roofside",),
    "mirror": ("leftmirror", "rightmirror"),
    "license plate": ("fliplate", "bliplate"),
}

# Class -> part of Pascal-Part-116 -> PASCAL-Part's parts. A part that is not named is the same in both.
PASCAL_PART_116: dict[str, Groups] = {
    "aeroplane": _WINGS,
    "bicycle": _WHEELS,
    "bird": _EYES | _WINGS | {"leg": ("lleg", "rleg"), "foot": ("lfoot", "rfoot")},
    "bottle": {},
    "bus": _VEHICLE,
    "car": _VEHICLE,
    "cat": _EYES | _EARS | _LEGS_AND_PAWS,
    "cow": _EYES | _EARS | _HORNS | _UPPER_AND_LOWER_LEGS,
    "dog": _EYES | _EARS | _LEGS_AND_PAWS,
    "horse": _EYES | _EARS | _UPPER_AND_LOWER_LEGS | {"hoof": ("lfho", "rfho", "lbho", "rbho")},
    "motorbike": _WHEELS,
    "person": {
        **_EYES,
        **_EARS,
        "eyebrow": ("lebrow", "rebrow"),
        "lower arm": ("llarm", "rlarm"),
        "upper arm": ("luarm", "ruarm"),
        "hand": ("lhand", "rhand"),
        "leg": ("llleg", "luleg", "rlleg", "ruleg"),
        "foot": ("lfoot", "rfoot"),
    },
    "pottedplant": {},
    "sheep": _EYES | _EARS | _HORNS | _UPPER_AND_LOWER_LEGS,
    "train": {
        "front": ("hfrontside", "cfrontside"),
        "side": ("hleftside", "hrightside", "cleftside", "crightside"),
        "back": ("hbackside", "cbackside"),
        "roof": ("hroofside", "croofside"),
    },
    "tvmonitor": {},
}
