"""Loading of images that names the file that cannot be read."""

from mmcv.transforms import LoadImageFromFile as MMCVLoadImageFromFile

from ..registry import TRANSFORMS


class UnreadableImageError(ValueError):
    """An image file is missing, empty or damaged; the message names it."""


@TRANSFORMS.register_module()
class LoadImageFromFile(MMCVLoadImageFromFile):
    """``mmcv.LoadImageFromFile`` whose errors name the file.

    For an empty file mmcv passes OpenCV's error on, which knows no path: among a million images
    that one is not found again. An image that OpenCV decodes in part (a JPEG whose end is cut off)
    is still taken, as in mmcv.

    Takes the arguments of ``mmcv.LoadImageFromFile``.
    """

    def transform(self, results: dict) -> dict | None:
        """Read ``results['img_path']``.

        Raises:
            UnreadableImageError: If that cannot be done.
        """
        try:
            return super().transform(results)
        # Each decoder and storage backend has its own exceptions.
        except Exception as error:
            reason = ' '.join(str(error).split()) or 'no reason given'
            raise UnreadableImageError(
                f'image {results["img_path"]} cannot be read; replace or remove the file '
                f'({type(error).__name__}: {reason})'
            ) from error
