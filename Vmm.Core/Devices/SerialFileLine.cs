using Microsoft.Extensions.Logging;
using Vmm.Core.Diagnostics;
using Vmm.Core.Errors;

namespace Vmm.Core.Devices;

/// <summary>
/// A file at the other end of a serial line. A failing disk must not fail the guest, so the first error is logged and all further output dropped.
/// </summary>
internal sealed class SerialFileLine : ISerialLine, IDisposable
{
    private readonly string _device;
    private readonly string _path;
    private readonly ILogger _logger;
    private readonly FileStream _file;
    private bool _failed;

    internal SerialFileLine(string device, string path, ILogger logger)
    {
        _device = device;
        _path = path;
        _logger = logger;
        try
        {
            // Append and share, because source and destination of a migration on one host may name the same file.
            _file = new FileStream(path, new FileStreamOptions
            {
                Mode = FileMode.Append, Access = FileAccess.Write, Share = FileShare.ReadWrite, UnixCreateMode = UnixFileMode.UserRead | UnixFileMode.UserWrite,
            });
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or NotSupportedException or ArgumentException)
        {
            throw new ConfigurationException($"device '{device}': option 'output': cannot open '{path}': {e.Message}", e);
        }
    }

    public bool TryWrite(byte value)
    {
        Do(() =>
        {
            _file.WriteByte(value);
            if (value == (byte)'\n' || !_file.CanSeek) _file.Flush();
        });
        return true;
    }

    public void OnReceiveRoom()
    {
    }

    public void Flush() => Do(_file.Flush);

    /// <summary>Moves to the end, because the source of a migration may have written since this process opened the file.</summary>
    public void SeekToEnd()
    {
        if (_file.CanSeek) Do(() => _file.Seek(0, SeekOrigin.End));
    }

    public void Dispose() => Do(_file.Dispose);

    private void Do(Action action)
    {
        if (_failed) return;
        try
        {
            action();
        }
        catch (IOException e)
        {
            _failed = true;
            CoreLog.SerialOutputLost(_logger, _device, _path, e.Message);
        }
    }
}
