using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Viewer;

/// <summary>
/// Reads any QEMU migration stream or VM state file, of any machine type, without a machine: <c>vmm stream show</c> and <c>vmm stream check</c>.
/// <see cref="StreamDocument.Findings"/> of the result say what breaks the format and where. <see cref="Core.Wire.WireLimits"/> bounds the memory,
/// whatever the file contains. Thread-safe: there is no state.
/// </summary>
internal static class StreamViewer
{
    /// <summary>Reads a file.</summary>
    /// <param name="path">Path of the file.</param>
    /// <param name="options">What to keep; null for the defaults.</param>
    /// <returns>The stream, decoded up to its end or to the first error that stops the reading.</returns>
    /// <exception cref="ChannelException">The file cannot be opened or read.</exception>
    public static StreamDocument ReadFile(string path, StreamViewOptions? options = null)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        using FileChannel file = FileChannel.Open(path, 0);
        return StreamParser.Parse(file, path, options ?? new StreamViewOptions());
    }

    /// <summary>Reads a seekable channel from its start.</summary>
    /// <param name="file">The channel; its position moves.</param>
    /// <param name="options">What to keep; null for the defaults.</param>
    /// <returns>The stream, decoded up to its end or to the first error that stops the reading.</returns>
    /// <exception cref="ChannelException">The channel cannot be read.</exception>
    internal static StreamDocument Read(ISeekableChannel file, StreamViewOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(file);
        return StreamParser.Parse(file, file.Name, options ?? new StreamViewOptions());
    }
}
