namespace Vmm.Core.Errors;

/// <summary>
/// Base of every failure that the product reports. <see cref="Errno"/> is what a wire protocol sends and the class what QMP reports;
/// the subtype fixes both (table in ERRORS.md). A message is short and names the object; the outermost handler prints the chain once. A plugin
/// derives its own failures.
/// </summary>
public abstract class VmmException : Exception
{
    /// <summary>Makes a failure.</summary>
    /// <param name="message">The object's name, then what failed; no full stop.</param>
    /// <param name="inner">The cause, or null.</param>
    /// <param name="errno">What a wire protocol answers.</param>
    protected VmmException(string message, Exception? inner, Errno errno) : this(message, inner, errno, QmpErrorClass.GenericError)
    {
    }

    private protected VmmException(string message, Exception? inner, Errno errno, QmpErrorClass qmpClass)
        : base(message, inner)
    {
        Errno = errno;
        QmpClass = qmpClass;
    }

    /// <summary>The errno that a wire protocol sends for this failure.</summary>
    public Errno Errno { get; }

    /// <summary>The QMP error class of this failure.</summary>
    internal QmpErrorClass QmpClass { get; }

    /// <summary>What the user can do about it, or null.</summary>
    public string? Hint { get; init; }

    /// <summary>Joins the messages of <paramref name="error"/> and its inner exceptions, outermost first, without repeats.</summary>
    /// <returns>One line of text.</returns>
    public static string Describe(Exception error)
    {
        ArgumentNullException.ThrowIfNull(error);
        var parts = new List<string>();
        for (Exception? e = error; e is not null; e = e.InnerException)
        {
            string text = e.Message.ReplaceLineEndings(" ").Trim();
            if (text.Length > 0 && !parts.Exists(p => p.Contains(text, StringComparison.Ordinal))) parts.Add(text);
        }
        return string.Join(": ", parts);
    }
}

/// <summary>Bytes from a peer violate the format. Carries the section and the stream offset if they are known.</summary>
/// <param name="message">What was expected and what was found.</param>
/// <param name="inner">The cause, or null.</param>
public class StreamFormatException(string message, Exception? inner = null) : VmmException(message, inner, Errno.EINVAL)
{
    /// <summary>The section, e.g. <c>ram/0</c>, or null.</summary>
    public string? Section { get; init; }

    /// <summary>The absolute stream offset of the offending bytes, or null.</summary>
    public long? Offset { get; init; }

    /// <summary>What the format requires, or null.</summary>
    public string? Expected { get; init; }

    /// <summary>What the bytes held, or null.</summary>
    public string? Found { get; init; }
}

/// <summary>The stream ended inside a field.</summary>
/// <param name="message">The field that is cut short, the bytes expected and those found.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class StreamTruncatedException(string message, Exception? inner = null) : VmmException(message, inner, Errno.EIO)
{
    /// <summary>The absolute stream offset of the field that is cut short, or null.</summary>
    public long? Offset { get; init; }
}

/// <summary>Well-formed input that exceeds a limit of <c>WireLimits</c>.</summary>
/// <param name="message">The limit by name, its value, and the value found.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class StreamLimitException(string message, Exception? inner = null) : VmmException(message, inner, Errno.E2BIG);

/// <summary>A valid stream does not fit this machine: an unknown section, a newer version, other RAM blocks.</summary>
/// <param name="message">What differs, with the expected and the found value.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class IncompatibleStateException(string message, Exception? inner = null) : VmmException(message, inner, Errno.EINVAL)
{
    /// <summary>The section, or null.</summary>
    public string? Section { get; init; }

    /// <summary>The absolute stream offset, or null.</summary>
    public long? Offset { get; init; }

    /// <summary>What this machine has, or null.</summary>
    public string? Expected { get; init; }

    /// <summary>What the stream has, or null.</summary>
    public string? Found { get; init; }
}

/// <summary>The operating system reported an error for a transport or a file.</summary>
/// <param name="message">The operation and the object.</param>
/// <param name="errno">The errno of the operating system.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class ChannelException(string message, Errno errno, Exception? inner = null) : VmmException(message, inner, errno);

/// <summary>A migration is refused because a blocker is registered or another migration runs.</summary>
/// <param name="message">A list of the reasons.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class MigrationBlockedException(string message, Exception? inner = null) : VmmException(message, inner, Errno.EBUSY);

/// <summary>A migration failed for a reason that another object recorded; the message is that error record in one line.</summary>
/// <param name="message">The error record in one line.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class MigrationFailedException(string message, Exception? inner = null) : VmmException(message, inner, Errno.EIO);

/// <summary>A device refused or failed to save, load, stop or start.</summary>
/// <param name="message">The device, then what failed.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class DeviceStateException(string message, Exception? inner = null) : VmmException(message, inner, Errno.EINVAL);

/// <summary>A device, snapshot, job or VM does not exist.</summary>
/// <param name="message">The name that was not found.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class DeviceNotFoundException(string message, Exception? inner = null)
    : VmmException(message, inner, Errno.ENODEV, QmpErrorClass.DeviceNotFound);

/// <summary>The device exists but cannot serve the request in its present state.</summary>
/// <param name="message">The device and its state.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class DeviceNotActiveException(string message, Exception? inner = null)
    : VmmException(message, inner, Errno.EAGAIN, QmpErrorClass.DeviceNotActive);

/// <summary>An option, URI, parameter or name is refused; nothing has changed yet.</summary>
/// <param name="message">The option and why it is refused.</param>
/// <param name="inner">The cause, or null.</param>
public sealed class ConfigurationException(string message, Exception? inner = null) : VmmException(message, inner, Errno.EINVAL);
