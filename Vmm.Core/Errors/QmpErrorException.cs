namespace Vmm.Core.Errors;

/// <summary>
/// A QMP error: a server returns it for a command, a client throws it for such a response (qmp 3). The errno is EINVAL for every class.
/// </summary>
public sealed class QmpErrorException : VmmException
{
    /// <summary>Makes an error of a known class.</summary>
    /// <param name="errorClass">The error's class.</param>
    /// <param name="description">Text for people.</param>
    internal QmpErrorException(QmpErrorClass errorClass, string description) : this(errorClass.ToString(), description)
    {
    }

    /// <summary>Makes an error of the class <see cref="QmpErrorClass.GenericError"/>.</summary>
    /// <param name="description">Text for people.</param>
    public QmpErrorException(string description) : this(QmpErrorClass.GenericError, description)
    {
    }

    /// <summary>Makes an error from a peer's response.</summary>
    /// <param name="className">The class as sent; an unknown one counts as <see cref="QmpErrorClass.GenericError"/>.</param>
    /// <param name="description">The text as sent.</param>
    public QmpErrorException(string className, string description)
        : base(description, null, Errno.EINVAL, Enum.TryParse(className, out QmpErrorClass known) ? known : QmpErrorClass.GenericError) => ClassName = className;

    /// <summary>The class as on the wire.</summary>
    public string ClassName { get; }
}
