using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>A file of the client that is reached by pread and pwrite; the ranges that lie in it share the descriptor.</summary>
/// <param name="fd">Owned by <see cref="DmaFiles"/>.</param>
/// <param name="key">Device and inode of the file, and whether the ranges are writable: a descriptor that came for reading may not be good for writing.</param>
internal sealed class DmaFile(OwnedFd fd, (ulong Device, ulong Inode, bool IsWritable) key)
{
    internal (ulong Device, ulong Inode, bool IsWritable) Key => key;

    /// <summary>Number of ranges in this file. Session's thread.</summary>
    internal int Users { get; set; }

    internal OwnedFd Fd => fd;

    /// <summary>Reads at an offset.</summary>
    /// <returns>EFAULT behind the end of the file, which the client may have truncated.</returns>
    internal Errno Read(ulong offset, Span<byte> destination)
    {
        while (destination.Length > 0)
        {
            int n = Posix.PRead(fd, destination, (long)offset, out Errno errno);
            if (n <= 0) return n < 0 ? errno : Errno.EFAULT;
            destination = destination[n..];
            offset += (uint)n;
        }
        return Errno.None;
    }

    /// <summary>Writes at an offset.</summary>
    /// <returns>As <see cref="Read"/>.</returns>
    internal Errno Write(ulong offset, ReadOnlySpan<byte> source)
    {
        // pwrite would enlarge a file that the client has truncated, and the write would look good although the client never sees it.
        Errno errno = Posix.Stat(fd, out FileStatus now);
        if (errno != Errno.None) return errno;
        if (offset + (ulong)source.Length > (ulong)Math.Max(0, now.SizeBytes)) return Errno.EFAULT;
        while (source.Length > 0)
        {
            int n = Posix.PWrite(fd, source, (long)offset, out errno);
            if (n <= 0) return n < 0 ? errno : Errno.EFAULT;
            source = source[n..];
            offset += (uint)n;
        }
        return Errno.None;
    }
}

/// <summary>The files of one client, each with one descriptor, however many ranges lie in it. Session's thread.</summary>
internal sealed class DmaFiles
{
    private readonly Dictionary<(ulong Device, ulong Inode, bool IsWritable), DmaFile> _files = [];

    internal int Count => _files.Count;

    /// <summary>Adds a range to a file.</summary>
    /// <param name="fd">Taken out of the caller's hands only when it is kept; null afterwards in that case.</param>
    /// <param name="status">Its fstat.</param>
    /// <param name="isWritable">The range is writable.</param>
    /// <returns>Null when the client has too many files.</returns>
    internal DmaFile? Take(ref OwnedFd? fd, in FileStatus status, bool isWritable)
    {
        (ulong, ulong, bool) key = (status.Device, status.Inode, isWritable);
        if (!_files.TryGetValue(key, out DmaFile? file))
        {
            if (_files.Count >= VfioUserLimits.DmaFiles) return null;
            _files.Add(key, file = new DmaFile(fd!, key));
            fd = null;
        }
        file.Users++;
        return file;
    }

    /// <summary>Removes a range from its file, and closes the file after the last one.</summary>
    internal void Release(DmaFile file)
    {
        if (--file.Users > 0) return;
        _files.Remove(file.Key);
        file.Fd.Dispose();
    }
}
