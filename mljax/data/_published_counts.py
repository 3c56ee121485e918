"""Published counts of data sets, that a wrong class order or a missing archive be found before a week of training."""

from mljax.data.coco import CLASSES_BY_ID
from mljax.data.voc import CLASSES as VOC

COCO = tuple(sorted(CLASSES_BY_ID))

# Images, by the name of the split. A count with a tilde is what papers or repositories mention: told, not insisted on.
IMAGES: dict[str, tuple[int, ...]] = {
    "VOC2007 train": (2501,),
    "VOC2007 val": (2510,),
    "VOC2007 trainval": (5011,),
    "VOC2007 test": (4952,),
    "VOC2012 train": (5717,),
    "VOC2012 val": (5823,),
    "VOC2012 trainval": (11540,),
    "VOC2012 test (unlabelled)": (10991,),
    "COCO2014 train": (82081,),
    "COCO2014 val": (40137,),
    "COCO2014 train (all images)": (82783,),
    "COCO2014 val (all images)": (40504,),
    "COCO2017 train": (117266,),
    "COCO2017 val": (4952,),
    "COCO2017 train (all images)": (118287,),
    "COCO2017 val (all images)": (5000,),
    "NUS-WIDE official train (all images)": (161789,),
    "NUS-WIDE official test (all images)": (107859,),
    "NUS-WIDE spml train": (150000,),
    "NUS-WIDE spml val": (60260,),
    "VG-500 train": (98249, 82904),  # the paper's, and the list in SSGRL's repository
    "VG-500 test": (10000,),
    "VG-200 train": (98249, 82904),
    "VG-200 test": (10000,),
}
ABOUT: dict[str, int] = {  # differs with the year of the crawl: within 1 %
    "NUS-WIDE official train": 125449,
    "NUS-WIDE official test": 83898,
}

# Images per class with a label +1, by the name of the split; the order is that of CLASS_ORDERS.
COUNTS: dict[str, tuple[int, ...]] = {
    "VOC2007 train": (
        *(112, 116, 180, 81, 139, 97, 376, 163, 224, 69, 97, 203, 139, 120, 1025, 133, 48, 111, 127, 128),
    ),
    "VOC2007 val": (
        *(126, 127, 150, 100, 105, 89, 337, 174, 221, 72, 103, 218, 148, 125, 983, 112, 48, 118, 134, 128),
    ),
    "VOC2007 trainval": (
        *(238, 243, 330, 181, 244, 186, 713, 337, 445, 141, 200, 421, 287, 245, 2008, 245, 96, 229, 261, 256),
    ),
    "VOC2007 test": (
        *(204, 239, 282, 172, 212, 174, 721, 322, 417, 127, 190, 418, 274, 222, 2007, 224, 97, 223, 259, 229),
    ),
    "VOC2012 train": (
        *(327, 268, 395, 260, 365, 213, 590, 539, 566, 151, 269, 632, 237, 265, 1994, 269, 171, 257, 273, 290),
    ),
    "VOC2012 val": (
        *(343, 284, 370, 248, 341, 208, 571, 541, 553, 152, 269, 654, 245, 261, 2093, 258, 154, 250, 271, 285),
    ),
    "VOC2012 trainval": (
        *(670, 552, 765, 508, 706, 421, 1161, 1080, 1119, 303, 538, 1286, 482, 526, 4087, 527, 325, 507, 544, 575),
    ),
    "COCO2014 train": (
        *(2243, 1171, 3924, 1618, 1804, 1884, 668, 2539, 3844, 2287, 2241, 2098, 3734, 5968, 5028, 1340),
        *(2791, 2080, 8606, 1186, 2818, 3322, 8950, 3159, 3170, 1389, 6518, 8378, 3041, 1062, 1518, 1205),
        *(2537, 1511, 1798, 128, 4861, 2068, 821, 1471, 1625, 3097, 2475, 1089, 2442, 1290, 1216, 2003),
        *(481, 45174, 2202, 3084, 1671, 2180, 1645, 673, 1105, 3291, 2511, 2209, 1170, 2493, 2986, 1214),
        *(1631, 2343, 1510, 2368, 2667, 151, 2317, 700, 2893, 2464, 4321, 3191, 2749, 2530, 1771, 1324),
    ),
    "COCO2014 val": (
        *(840, 491, 1832, 728, 799, 845, 341, 1292, 1961, 1114, 1121, 1048, 1828, 2912, 2397, 670),
        *(1350, 969, 4180, 578, 1480, 1695, 4404, 1704, 1448, 666, 3061, 3960, 1521, 523, 714, 592),
        *(1173, 757, 849, 70, 2272, 1001, 452, 750, 727, 1410, 1232, 512, 1219, 674, 568, 989),
        *(261, 21634, 1117, 1540, 790, 1041, 818, 302, 489, 1574, 1092, 993, 533, 1189, 1445, 589),
        *(876, 1292, 724, 1193, 1288, 74, 1185, 341, 1437, 1281, 2056, 1577, 1393, 1200, 872, 677),
    ),
}
CLASS_ORDERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "VOC": (VOC,),
    "COCO": (COCO, CLASSES_BY_ID),  # the first is that of COUNTS
}


def counts(name: str) -> dict[str, int] | None:
    """Published images per class of the split of this name, or None."""
    plain = plain_name(name).replace(" (all images)", "")
    if plain not in COUNTS:
        return None
    return dict(zip(CLASS_ORDERS[plain[:4] if plain.startswith("COCO") else "VOC"][0], COUNTS[plain]))


def plain_name(name: str) -> str:
    """The name without what tells of a packing or of TFDS, whose images are the same."""
    name = name.split(" (short side")[0]
    if " (TFDS)" not in name:
        return name
    return name.replace(" (TFDS)", "").replace("train+validation", "trainval").replace("validation", "val")
